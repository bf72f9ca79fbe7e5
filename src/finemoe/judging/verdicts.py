"""An answer as a reward sees it, and what a reward says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from finemoe.core.config import Config

Verdict = Literal["right", "wrong", "unreadable", "error"]
"""unreadable: there is nothing in the answer that could be judged, which is worth 0. error: the judging failed, which
says nothing about the answer: such an answer has no reward at all."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and what is known of the question."""

    prompt: str
    text: str
    """What it wrote, without the prompt."""
    ended: bool
    """By itself, and not because its room ran out."""
    num_tokens: int
    record: Mapping[str, Any]
    """The record that the question is from."""
    references: tuple[str, ...]
    """What is right; any of them."""
    asked: str = ""
    """The prompt as the model read it, with its template; empty where nobody knows."""


@dataclass(frozen=True)
class Judged:
    """What one reward says of one answer."""

    verdict: Verdict
    value: float
    """0 of what is unreadable; of an error it says nothing."""
    note: str = ""
    steps: tuple[tuple[int, float], ...] = ()
    """Of each step, where it ends, in characters of the text, and its value."""

    @staticmethod
    def whether(right: bool, note: str = "") -> Judged:
        """1 for right, 0 for wrong."""
        return Judged("right" if right else "wrong", float(right), note)

    @staticmethod
    def unreadable(note: str) -> Judged:
        """Nothing to be judged."""
        return Judged("unreadable", 0.0, note)

    @staticmethod
    def error(note: str) -> Judged:
        """The judging failed."""
        return Judged("error", 0.0, note)


@dataclass(frozen=True)
class Bounds:
    """What judging one answer may take."""

    deadline_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    """Beyond what the process holds before its first answer."""


Judge = Callable[[Answer], Judged]


class Weighted(Config):
    """What every reward has."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """What the run's figures call it. None: its kind; two of one kind need names."""
    weight: float = 1.0
    """[factor] Of its value in the sum of all rewards. 0: it is only watched, and may fail."""

    def identity(self) -> dict[str, Any]:
        """JSON-able: equal where two rewards say the same of every answer."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Kind:
    """A kind of reward: its configuration, and what makes a judge of it."""

    config: type[Weighted]
    make: Callable[[Any, Bounds], Judge] = field(repr=False)
    supervised: bool = False
    """It runs something in the sandbox, which keeps the deadline itself and knows whose fault the time is."""
    may_fail: bool = False
    """Making it may fail: a file of the user's, a package, or a sandbox that this system does not have."""
    compares: bool = False
    """It is an error of every answer to a question whose record does not say what would be right."""
