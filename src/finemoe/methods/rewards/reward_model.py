"""A reward from a model that was trained by the method `reward`: what it would say behind the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.checkpoint.language_model import open_language_model
from finemoe.core.errors import ConfigError, DataError
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.messages import FormError, Message
from finemoe.judging.verdicts import Answer, Judged, Weighted
from finemoe.methods.reward import label_ids, labels_for
from finemoe.text.turns import Turns, encode_all


class RewardModelReward(Weighted):
    """What a reward model thinks of an answer: the logit of one word minus that of another; higher is better.

    It has no zero of its own unless it was trained pointwise, so that it ranks the answers of a group.
    """

    kind: Literal["reward_model"] = "reward_model"
    model: str
    """A run of the method `reward`, or whatever was exported of one."""
    labels: tuple[str, str] | None = None
    """Its words for good and bad. None: as it finds them itself."""
    batch_tokens: Annotated[int, Field(gt=0)] = 16_384
    """[tokens] Answers that it reads together."""


class RewardModel:
    """The model, opened, in this process."""

    def __init__(self, config: RewardModelReward) -> None:
        """Open it.

        Raises:
            CheckpointError: nothing that can be opened.
            ConfigError: it has no chat template, or a label is no token of its tokenizer.
        """
        self._opened = open_language_model(config.model)
        template = self._opened.template
        if template is None:
            raise ConfigError(
                f"reward model {config.model}: has no chat template, so answers cannot be read as it learnt"
            )
        self._template = template
        self._most = config.batch_tokens
        self._labels = label_ids(self._opened.tokenizer, labels_for(self._opened.tokenizer, config.labels))

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return fingerprint(self._opened.model)

    def judge(self, answers: Sequence[Answer]) -> list[Judged]:
        """Of each answer; right: it finds it rather good. Error: its template cannot write the conversation."""
        asked = [(*_asked(one), {"role": "assistant", "content": one.text}) for one in answers]
        turns = encode_all(self._template, self._opened.tokenizer, asked)
        found: list[Judged] = [Judged.error(str(one)) if isinstance(one, DataError) else _PENDING for one in turns]
        readable = {number: one.ids for number, one in enumerate(turns) if isinstance(one, Turns)}
        group: list[int] = []
        tokens = 0
        for number, ids in readable.items():
            if group and tokens + len(ids) > self._most:
                self._read(group, readable, found)
                group, tokens = [], 0
            group.append(number)
            tokens += len(ids)
        if group:
            self._read(group, readable, found)
        return found

    @torch.no_grad()
    def _read(self, group: Sequence[int], ids: dict[int, tuple[int, ...]], found: list[Judged]) -> None:
        """Several conversations in one row, each a document by itself."""
        device = self._opened.device
        lengths = [len(ids[number]) for number in group]
        tokens = torch.tensor([[one for number in group for one in ids[number]]], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
        documents = torch.repeat_interleave(torch.arange(len(group)), torch.tensor(lengths))[None].to(device)
        model = self._opened.model
        hidden = model(tokens, positions=positions, documents=documents).hidden[0]
        ends = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1].float()
        logits = ends @ model.head_rows(self._labels).float().t()
        for number, value in zip(group, (logits[:, 0] - logits[:, 1]).tolist(), strict=True):
            finite = math.isfinite(value)
            verdict: Any = "right" if value > 0 else "wrong"
            found[number] = Judged(verdict, value) if finite else Judged.error(f"the reward model said {value}")


_PENDING = Judged.error("not judged")


def _asked(answer: Answer) -> tuple[Message, ...]:
    """The messages that were answered, as the record has them, or the prompt as the user's only one."""
    try:
        said = read(answer.record)
    except FormError:
        return ({"role": "user", "content": answer.prompt},)
    return said.question.messages or ({"role": "user", "content": answer.prompt},)
