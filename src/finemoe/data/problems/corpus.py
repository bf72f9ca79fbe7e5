"""A corpus of problems made in code, as texts to learn from or as records to be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finemoe.core.config import Config
from finemoe.core.errors import DataError
from finemoe.data.documents.document import Document, SkipReport, falls_within
from finemoe.data.problems import DIFFICULTIES, Problem, problem_at

Side = Literal["train", "validation"]
Difficulty = Annotated[int, Field(ge=1)]


class ProblemsCorpus(Config):
    """Problems made in code, each with an answer that can be checked: nothing is downloaded."""

    kind: Literal["problems"] = "problems"
    problem: Literal["running_sum", "arithmetic", "countdown", "sorting", "programs", "reasoning_gym"] = "running_sum"
    """Digits and their sum modulo `modulus`; terms of + - *; a number to be reached with given ones; numbers or words
    to be sorted; small functions in Python; or a task of the package reasoning-gym (the `[rl]` extra)."""
    count: Annotated[int, Field(gt=0)] = 10_000
    """[problems] How many are drawn to train on; one that is drawn twice, or is validated on, is left out."""
    validation_count: Annotated[int, Field(ge=0)] = 200
    """[problems] How many are drawn to validate on. 0: the share `validation_share` of those to train on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """[number] Of the draws: another seed, other problems."""
    difficulty: Difficulty | tuple[Difficulty, Difficulty] | None = None
    """[level] How hard they are: digits of a running sum, for example. A pair rises evenly from the first problem to
    the last, for methods that keep the order; those to validate on are of every level in turn. None: 6 of a running
    sum, 3 of sorting, 2 of arithmetic, else 1."""
    reasoned: Annotated[float, Field(ge=0, le=1)] = 1.0
    """[share] Of those problems whose solution shows its steps; the others say the answer alone."""
    modulus: Annotated[int, Field(ge=2, le=10)] | None = None
    """[number] Of running sums, whose digits are below it. None: 5."""
    scripts: Annotated[tuple[Literal["latin", "greek", "cyrillic"], ...], Field(min_length=1)] | None = None
    """Of running sums: each step is a word of letters, in one of these scripts by chance, so that more than one are
    mixed as a model mixes languages. None: of digits, without blanks. The reward `steps` asks for the very words."""
    dataset: str | None = None
    """The task of reasoning-gym, by its name there."""
    options: dict[str, Any] | None = None
    """What reasoning-gym's task takes, such as { min_terms = 2 }."""

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> ProblemsCorpus:
        gym = self.problem == "reasoning_gym"
        if gym and self.dataset is None:
            raise ValueError('problem "reasoning_gym" needs `dataset`, a task such as "basic_arithmetic"')
        for name, value, fits in (
            ("modulus", self.modulus, self.problem == "running_sum"),
            ("scripts", self.scripts, self.problem == "running_sum"),
            ("dataset", self.dataset, gym),
            ("options", self.options, gym),
        ):
            if value is not None and not fits:
                raise ValueError(f"`{name}` says nothing of {self.problem} problems: leave it out")
        low, high = self._range
        most = DIFFICULTIES[self.problem][1]
        if not low <= high <= most:
            raise ValueError(f"`difficulty` of {self.problem} rises from 1 to {most} at most, not from {low} to {high}")
        if high - low >= self.count:
            raise ValueError(f"`count` {self.count} is too few to rise from difficulty {low} to {high}")
        return self

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """Problems to train on, in order; as text a prompt and its completion, `whole` a record as JSON."""
        seen = {one.prompt for one in self._problems("validation")}
        empty = True
        for document in self._unseen("train", seen, report, whole):
            empty = False
            yield document
        if empty:
            raise DataError(
                f"all {self.problem} problems that are drawn to train on are validated on: there are too few of this "
                "difficulty; raise `difficulty`, or lower `validation_count`"
            )

    def validation_documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document] | None:
        """Problems to validate on, which are none of the others; None where a share of those is set aside."""
        if not self.validation_count:
            return None
        return self._unseen("validation", set(), report, whole)

    @property
    def _range(self) -> tuple[int, int]:
        if isinstance(self.difficulty, tuple):
            return self.difficulty
        level = self.difficulty or DIFFICULTIES[self.problem][0]
        return level, level

    def _problems(self, side: Side) -> Iterator[Problem]:
        count = self.count if side == "train" else self.validation_count
        low, high = self._range
        options: dict[str, Any] = {}
        if self.problem == "running_sum":
            options = {"modulus": self.modulus or 5, "scripts": self.scripts or ()}
        elif self.problem == "reasoning_gym":
            options = {"dataset": self.dataset, "options": self.options or {}}
        levels = high - low + 1
        for number in range(count):
            if side == "train":
                yield problem_at(self.problem, self.seed, number, low + levels * number // count, **options)
            else:  # in turn, so that the first few are of every level
                yield problem_at(self.problem, self.seed, -1 - number, low + number % levels, **options)

    def _unseen(self, side: Side, seen: set[str], report: SkipReport, whole: bool) -> Iterator[Document]:
        """Those of a side whose prompt is not in `seen`, which grows; the others are copies, whatever their answer."""
        report.drawn = True
        for number, one in enumerate(self._problems(side)):
            if one.prompt in seen:
                report.duplicates += 1
                continue
            seen.add(one.prompt)
            yield self._document(f"{side}/{number:07}", one, whole)

    def _document(self, name: str, problem: Problem, whole: bool) -> Document:
        reasoned = falls_within(self.reasoned, f"reasoned/{self.seed}", name)
        completion = problem.solution if reasoned else problem.answer
        text = problem.prompt + completion
        if whole:
            record = {
                "prompt": problem.prompt,
                "completion": completion,
                "answer": problem.answer,
                "problem": problem.kind,
                "difficulty": problem.difficulty,
                "steps": list(problem.steps),
                "tests": None if problem.tests is None else list(problem.tests),
                **problem.more,
            }
            text = json.dumps(record, ensure_ascii=False)
        return Document(f"{self.problem}/{name}", self.problem, text)
