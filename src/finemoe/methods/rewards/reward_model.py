"""A reward from a model that was trained by the method `reward`: what it would say behind the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from finemoe.core import errors
from finemoe.core.child import ask, end_all
from finemoe.core.errors import FinemoeError, RunError
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.messages import FormError, Message
from finemoe.judging.verdicts import Answer, Bounds, Judged, Weighted

_OPENING_SECONDS = 3600.0  # a large one from a slow disk
_TOGETHER = 32  # answers that are asked about at once, and fail at once
_FAILURES = 3  # after which a batch is given up: each costs the opening of the model


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
    """The model, opened, in a process of its own, which is replaced when it hangs, crashes or grows."""

    def __init__(self, config: RewardModelReward, bounds: Bounds) -> None:
        """Open it.

        Args:
            config: which model, and how much it reads together.
            bounds: of one answer. Of several that are read together the time is that of all; the memory is one's.

        Raises:
            FinemoeError: nothing that can be opened.
            ConfigError: it has no chat template, or a label is no token of its tokenizer.
            RunError: its process ended before it was open.
        """
        self._config, self._bounds = config, bounds
        self._children: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _end, self._children)  # of who forgot to close it, or ended before
        self.sha256 = self._open()
        """Of its weights."""

    def judge(self, answers: Sequence[Answer]) -> list[Judged]:
        """Of each answer; right: it finds it rather good.

        Error: its template cannot write the conversation, or its process hung, crashed or grew over it. Where that
        happens to several at once, each is read by itself; where it hangs, or fails often, the rest is not tried.
        """
        talks = [(*_asked(one), {"role": "assistant", "content": one.text}) for one in answers]
        found: dict[int, Judged] = {}
        left = deque(list(range(len(talks)))[first : first + _TOGETHER] for first in range(0, len(talks), _TOGETHER))
        failures = 0  # of answers by themselves, one after the other
        try:
            while left:
                numbers = left.popleft()
                judged = self._ask([talks[number] for number in numbers])
                if not isinstance(judged, str):
                    found |= dict(zip(numbers, judged, strict=True))
                    failures = 0
                elif len(numbers) > 1 and judged != self._late(numbers):
                    left.extendleft([number] for number in reversed(numbers))
                else:
                    found |= dict.fromkeys(numbers, Judged.error(judged))
                    failures += 1
                    if failures == _FAILURES or judged == self._late(numbers):
                        rest = [number for some in left for number in some]
                        found |= dict.fromkeys(rest, Judged.error(f"not tried, as before it: {judged}"))
                        break
        except BaseException:  # an interrupt leaves a process whose next answers belong to these questions
            self.close()
            raise
        return [found[number] for number in range(len(talks))]

    def close(self) -> None:
        """End the process; the next answers start another."""
        _end(self._children)

    def _late(self, numbers: Sequence[int]) -> str:
        return f"no verdict within {len(numbers) * self._bounds.deadline_seconds:g} seconds"

    def _ask(self, talks: Sequence[Any]) -> list[Judged] | str:
        """What it says of each; else why it says nothing."""
        try:
            if any(one.poll() is not None for one in self._children):  # since it last answered
                self.close()
            if not self._children and self._open() != self.sha256:
                self.close()
                return f"{self._config.model} is no longer the model that it was"
        except FinemoeError as error:
            return f"the reward model does not open any more: {error}"
        (child,) = self._children
        seconds = len(talks) * self._bounds.deadline_seconds
        until = time.monotonic() + seconds
        request = {"talks": talks, "tokens": self._config.batch_tokens, "seconds": seconds}
        reply = ask(child, json.dumps(request, default=str), seconds)
        if reply is not None and "judged" in reply:
            return [Judged(**{**one, "steps": ()}) for one in reply["judged"]]
        self.close()
        if reply is not None:
            return str(reply["failed"])
        return self._late(talks) if time.monotonic() >= until else "its process ended, perhaps for want of memory"

    def _open(self) -> str:
        """Start the process; the sha256 of the weights that it has opened.

        Raises:
            FinemoeError: as the process met it.
        """
        paths = os.pathsep.join(one for one in sys.path if one)
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "finemoe.methods.rewards.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # without memory, a tokenizer that writes where it was waits for itself
            env={**os.environ, "PYTHONPATH": paths, "RUST_BACKTRACE": "0"},
            start_new_session=True,
        )
        self._children.append(child)
        setup = {
            "model": self._config.model,
            "labels": self._config.labels,
            "memory": self._bounds.memory_bytes,
            "threads": torch.get_num_threads(),
        }
        reply = ask(child, json.dumps(setup), _OPENING_SECONDS)
        if reply is not None and reply["ready"]:
            return str(reply["sha256"])
        self.close()
        if reply is None:
            raise RunError(f"reward model {self._config.model}: its process ended before it was open")
        kind = getattr(errors, reply["error"], RunError)
        raise kind(reply["note"])


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    while children:
        end_all(children.pop())


def _asked(answer: Answer) -> tuple[Message, ...]:
    """The messages that were answered, as the record has them, or the prompt as the user's only one."""
    try:
        said = read(answer.record)
    except FormError:
        return ({"role": "user", "content": answer.prompt},)
    return said.question.messages or ({"role": "user", "content": answer.prompt},)
