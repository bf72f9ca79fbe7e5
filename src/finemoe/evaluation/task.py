"""Task: what is asked of a model, and how its answers are judged. Tasks know no model; the runner knows no task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Outcome = Literal["answered", "no_answer", "undecided", "timeout", "crash", "violation", "error"]
"""What became of an item. Only `answered` and `no_answer` say plainly something about the model: the rest is counted
apart. `undecided`: answered, but nothing here can tell whether rightly; it scores as wrong, so that the score is a
lower bound. A checker's own `error` is never a wrong answer: it has no score."""


@dataclass(frozen=True)
class LogLikelihood:
    """How probable is `continuation` after `context`? Joined as they are: a blank between them is in one of them."""

    context: str
    """May be empty: then the model's first token stands before the continuation."""
    continuation: str


@dataclass(frozen=True)
class Rolling:
    """How probable is the whole text? Read in windows of the model's length, each token predicted once."""

    text: str


@dataclass(frozen=True)
class Generate:
    """Continue `prompt` until one of `stops` appears (left out of the answer) or `max_new_tokens` are written."""

    prompt: str
    stops: tuple[str, ...]
    max_new_tokens: int
    samples: int = 1
    """Independent completions, for pass@k; drawn at `temperature`."""
    temperature: float = 0.0
    suffix: str | None = None
    """With a suffix: fill the middle between `prompt` and it, in the tokenizer's own fill-in-the-middle tokens."""


Request = LogLikelihood | Rolling | Generate


@dataclass(frozen=True)
class Scored:
    """The answer to `LogLikelihood` and `Rolling`."""

    logprob: float
    """Nats, the sum over the tokens asked for."""
    num_tokens: int
    greedy: bool
    """Every token asked for was the most probable one."""
    truncated: bool = False
    """The context was cut from the left to fit the model."""


@dataclass(frozen=True)
class Generated:
    """The answer to `Generate`."""

    texts: tuple[str, ...]
    """One for each sample."""
    num_tokens: int
    truncated: bool = False
    """The prompt was cut from the left to fit the model."""
    unfinished: int = 0
    """Samples that neither a stop nor the model ended."""


Answer = Scored | Generated


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    id: str
    """Unique within the task and stable: resuming and pairing go by it."""
    requests: tuple[Request, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What judging needs: gold answer, tests, lengths ... JSON values only."""
    group: str | None = None
    """Subject or level, for scores by group (MMLU, MATH)."""


@dataclass(frozen=True)
class Judged:
    """What an item's answers are worth."""

    scores: Mapping[str, float]
    """By metric name. A metric's score over a task is sum(score · weight) / sum(weight)."""
    outcome: Outcome = "answered"
    weight: float = 1.0
    """Bytes of text for bits per byte; 1 for everything that is counted by item."""
    note: str = ""
    """Why, where it is not plain: what the sandbox said, what could not be read."""


class Task(Protocol):
    """A benchmark."""

    @property
    def name(self) -> str:
        """As `--tasks` spells it."""

    @property
    def title(self) -> str:
        """As people spell it."""

    @property
    def metric(self) -> str:
        """The headline metric, one of those that `judge` gives."""

    @property
    def shots(self) -> int:
        """Worked examples in the prompt; those of the papers unless changed."""

    @property
    def chance(self) -> float | None:
        """Headline score of guessing; None where guessing cannot succeed."""

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """Items of the data at `source` (the set's own format), and how many records were skipped.

        `limit`: the first so many; of several groups the first of each, evenly.

        Raises:
            DataError: no data there, or none that can be read; it says where to get it and in what form.
        """

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """Judge the answers to `item.requests`, in their order."""
