"""The process in which a reward model reads: `python -P -m finemoe.methods.rewards.child`, a line in, a line out.

It has a bound of memory, of the GPU's where the model is there, and its parent (`methods.rewards.reward_model`) ends it
when it does not answer in time.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.judging.child import in_words, limit_memory, say, take_pipes
from finemoe.judging.verdicts import Judged, Verdict
from finemoe.methods.reward import label_ids, labels_for
from finemoe.text.turns import Turns, encode_all

_GRACE = 1.0  # [s] beyond the deadline, for a parent that is no longer there
_FIRST = 256  # [tokens] read before memory is bounded, since the stacks of threads are no answer's


class Reader:
    """The model, opened."""

    def __init__(self, model: str, labels: tuple[str, str] | None) -> None:
        """Open it.

        Raises:
            FinemoeError: nothing that can be opened.
            ConfigError: it has no chat template, or a label is no token of its tokenizer.
        """
        self._opened = open_language_model(model)
        template = self._opened.template
        if template is None:
            raise ConfigError("it has no chat template by which to read answers: train one by the method reward first")
        self._template = template
        tokenizer = self._opened.tokenizer
        self._labels = label_ids(tokenizer, labels_for(tokenizer, labels), "labels")

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return fingerprint(self._opened.model)

    def bound(self, memory: int) -> None:
        """Allow so many bytes beyond what is held now."""
        self._values([[0] * min(_FIRST, self._opened.reach or _FIRST)])
        if self._opened.device.type == "cuda":  # whose driver lays claim to addresses that it never uses
            held, all_of_it = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (held + memory) / all_of_it))
        else:
            limit_memory(memory)

    def judge(self, talks: Sequence[Any], most: int) -> list[Judged]:
        """Of each conversation, at most `most` tokens together; right: it finds the answer rather good."""
        found: dict[int, Judged] = {}
        groups: list[dict[int, Sequence[int]]] = []
        tokens = most
        for number, turns in enumerate(encode_all(self._template, self._opened.tokenizer, talks)):
            if not isinstance(turns, Turns):
                found[number] = Judged.error(str(turns))
                continue
            tokens += len(turns.ids)
            if tokens > most:
                groups.append({})
                tokens = len(turns.ids)
            groups[-1][number] = turns.ids
        for group in groups:
            for number, value in zip(group, self._values([*group.values()]), strict=True):
                finite = math.isfinite(value)
                verdict: Verdict = "right" if value > 0 else "wrong"
                found[number] = Judged(verdict, value) if finite else Judged.error(f"the reward model said {value}")
        return [found[number] for number in range(len(talks))]

    @torch.no_grad()
    def _values(self, group: Sequence[Sequence[int]]) -> list[float]:
        """Of several conversations in one row, each a document by itself."""
        device, model = self._opened.device, self._opened.model
        lengths = [len(ids) for ids in group]
        tokens = torch.tensor([[one for ids in group for one in ids]], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        documents = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(lengths))[None].to(device)
        hidden = model(tokens, positions=positions, documents=documents).hidden[0]
        ends = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1].float()
        logits = ends @ model.head_rows(self._labels).float().t()
        return [float(value) for value in logits[:, 0] - logits[:, 1]]


def main() -> None:
    """Answer until stdin ends, then take along whatever is still running in this process's group."""
    requests, replies = take_pipes()
    setup = json.loads(requests.readline())
    torch.set_num_threads(setup["threads"])
    try:
        reader = Reader(setup["model"], setup["labels"] and tuple(setup["labels"]))
        sha256 = reader.sha256
        reader.bound(setup["memory"])
    except BaseException as error:  # a file that somebody made may do anything
        known = isinstance(error, FinemoeError)
        say(replies, ready=False, error=type(error).__name__, note=str(error) if known else in_words(error))
    else:
        say(replies, ready=True, sha256=sha256)
        for line in requests:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE)  # its default action ends the process
            try:
                judged = reader.judge(request["talks"], request["tokens"])
            except Exception as error:  # torch's, where there is no memory left
                say(replies, failed=in_words(error))
                break  # what holds it may be held for good
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            say(replies, judged=[asdict(one) for one in judged])
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
