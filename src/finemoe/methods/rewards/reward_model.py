"""A reward from a model that was trained by the method `reward`: what it would say behind the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from finemoe.core import errors
from finemoe.core.child import ask, end_all, has_ended
from finemoe.core.errors import FinemoeError, OutageError, RunError
from finemoe.core.logs import logger
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.messages import FormError, Message
from finemoe.judging.pool import by_turns
from finemoe.judging.verdicts import Answer, Bounds, Judged, Weighted

_OPENING_SECONDS = 3600.0  # a large one from a slow disk
_TOGETHER = 32  # answers that are asked about at once, and fail at once
_FAILURES = 3  # questions in a row after which a batch is given up: each costs the opening of the model
_IN_A_ROW = 5  # the same of answers, where there are fewer questions
_LONG, _PATIENCE = 15.0, 5.0  # [s] before anybody is told; and once the run is asked to end
_ENDED = "its process ended, perhaps for want of memory"


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


@dataclass(frozen=True)
class _Fault:
    """Why nothing was said of answers."""

    why: str
    lasts: bool = False
    """It would be so with others, too."""


class RewardModel:
    """The model, opened, in a process of its own, which is replaced when it hangs, crashes or grows."""

    def __init__(
        self,
        config: RewardModelReward,
        bounds: Bounds,
        on_failure: Callable[[str], object] = lambda why: None,
        keys: str | None = None,
    ) -> None:
        """Open it.

        Args:
            config: which model, and how much it reads together.
            bounds: of one answer. Of several that are read together the time is that of all; the memory is one's.
            on_failure: is told at once why an answer could not be judged.
            keys: as of `Rewards`.

        Raises:
            FinemoeError: nothing that can be opened.
            ConfigError: it has no chat template, or a label is no token of its tokenizer.
            RunError: its process ended before it was open.
        """
        self._config, self._bounds, self._on_failure, self._keys = config, bounds, on_failure, keys
        self._told_apart = self._told_long = False
        self._hurried = 0.0  # when it was asked to
        self._children: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _end, self._children)  # of who forgot to close it, or ended before
        self.sha256 = self._open()
        """Of its weights."""

    def judge(self, answers: Sequence[Answer]) -> list[Judged]:
        """Of each answer; right: it finds it rather good.

        Error: its template cannot write the conversation, or its process hung, crashed or grew over it. Where several
        at once crash or grow, each is read by itself. Where it hangs with several, or fails with five answers, or with
        answers to three questions, one after the other, the rest is not tried.

        Raises:
            OutageError: `hurry` was called, and for a moment nothing came.
        """
        talks = [(*_asked(one), {"role": "assistant", "content": one.text}) for one in answers]
        order = by_turns(answers)
        left = deque(order[first : first + _TOGETHER] for first in range(0, len(order), _TOGETHER))
        found: dict[int, Judged] = {}
        failed: list[str] = []  # questions of the answers that failed by themselves, one after the other
        try:
            while left:
                numbers = left.popleft()
                judged = self._ask([talks[number] for number in numbers])
                if not isinstance(judged, _Fault):
                    found |= dict(zip(numbers, judged, strict=True))
                    for one in judged:
                        if one.verdict == "error":  # of what it was asked, and not of its process
                            self._on_failure(one.note)
                    failed.clear()
                elif len(numbers) > 1 and not judged.lasts:
                    self._say_apart(len(numbers), judged)
                    left.extendleft([number] for number in reversed(numbers))
                else:
                    self._fail(found, numbers, judged.why)
                    failed.append(answers[numbers[0]].prompt)
                    if judged.lasts or len(set(failed)) == _FAILURES or len(failed) == _IN_A_ROW:
                        self._fail(found, [one for some in left for one in some], f"not tried, as before: {judged.why}")
                        break
        except BaseException:  # an interrupt leaves a process whose next answers belong to these questions
            self.close()
            raise
        return [found[number] for number in range(len(talks))]

    def _fail(self, found: dict[int, Judged], numbers: Sequence[int], why: str) -> None:
        for number in numbers:
            found[number] = Judged.error(why)
            self._on_failure(why)

    def _say_apart(self, number: int, fault: _Fault) -> None:
        if not self._told_apart:
            self._told_apart = True
            memory = f", or raise {self._keys}reward_memory from {self._bounds.memory_bytes} (bytes)"
            logger.warning(
                "reward model %s: %d answers together failed, and are read one by one, which takes longer: %s. Lower "
                "its batch_tokens from %d%s",
                self._config.model, number, fault.why, self._config.batch_tokens, "" if self._keys is None else memory,
            )  # fmt: skip

    def close(self) -> None:
        """End the process; the next answers start another."""
        _end(self._children)

    def _ask(self, talks: Sequence[Any]) -> list[Judged] | _Fault:
        """What it says of each; else why it says nothing."""
        try:
            if any(has_ended(one) for one in self._children):  # since it last answered
                self.close()
            if not self._children and self._open() != self.sha256:
                self.close()
                return _Fault(f"{self._config.model} is no longer the model that it was", lasts=True)
        except OutageError:
            raise
        except FinemoeError as error:
            return _Fault(f"the reward model does not open any more: {error}", lasts=True)
        (child,) = self._children
        seconds = len(talks) * self._bounds.deadline_seconds
        began = time.monotonic()
        request = {"talks": talks, "tokens": self._config.batch_tokens, "seconds": seconds}
        line = json.dumps(request, default=str)
        reply = ask(child, line, seconds, lambda: self._look(began, len(talks), seconds))
        if reply is not None and "judged" in reply:
            return [Judged(**{**one, "steps": ()}) for one in reply["judged"]]
        self.close()
        if reply is not None:
            return _Fault(str(reply["failed"]))
        late = time.monotonic() >= began + seconds
        # One that is late by itself is perhaps the only one; of several that are, each would have had all their time.
        return _Fault(f"no verdict within {seconds:g} seconds" if late else _ENDED, lasts=late and len(talks) > 1)

    def _look(self, began: float, number: int, seconds: float) -> None:
        """Tell once of what takes long.

        Raises:
            OutageError: as `_heed` does.
        """
        now = time.monotonic()
        if now - began > _LONG and not self._told_long:
            self._told_long = True
            logger.warning(
                "reward model %s is at %d answers for %.0f s; it is ended after %g s, %g for each%s",
                self._config.model, number, now - began, seconds, self._bounds.deadline_seconds,
                "" if self._keys is None else f" ({self._keys}reward_seconds)",
            )  # fmt: skip
        self._heed()

    def _heed(self) -> None:
        """Wait for a moment more where the run is asked to end.

        Raises:
            OutageError: that moment has passed.
        """
        if self._hurried and time.monotonic() - self._hurried >= _PATIENCE:
            raise OutageError("the reward model is waited for no longer, since the run was asked to end")

    def hurry(self) -> None:
        """A person asks the run to end: what takes longer than a moment is waited for no more."""
        self._hurried = self._hurried or time.monotonic()

    def _open(self) -> str:
        """Start the process; the sha256 of the weights that it has opened.

        Raises:
            FinemoeError: as the process met it.
            OutageError: as `_heed` does.
        """
        paths = os.pathsep.join(one for one in sys.path if one)
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "finemoe.methods.rewards.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Without memory, a tokenizer that writes where it was waits for itself. And heaps for every thread would be
            # taken of the bound by the first answer.
            env={**os.environ, "PYTHONPATH": paths, "RUST_BACKTRACE": "0", "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )
        self._children.append(child)
        setup = {
            "model": self._config.model,
            "labels": self._config.labels,
            "memory": self._bounds.memory_bytes,
            "threads": torch.get_num_threads(),
        }
        reply = ask(child, json.dumps(setup), _OPENING_SECONDS, self._heed)
        if reply is not None and reply["ready"]:
            return str(reply["sha256"])
        self.close()
        if reply is None:
            raise RunError(f"reward model {self._config.model}: its process ended before it was open")
        kind = getattr(errors, reply["error"], RunError)
        raise kind(f"reward model {self._config.model}: {reply['note']}")


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
