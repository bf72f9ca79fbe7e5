"""From records to questions with their worked examples, the same way for every task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from finemoe.core.errors import ConfigError, DataError
from finemoe.core.logs import logger
from finemoe.data.documents.document import SkipReport
from finemoe.evaluation.forms.finding import DataForm
from finemoe.evaluation.records import Record, Unreadable

Role = Literal["asked", "shot", "neither"]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A record as a task asks it."""

    id: str
    prompt: str
    """What stands before the answer; empty where the options bring their own contexts."""
    worked: str
    """The question with its right answer: how it looks as an example for others."""
    group: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    """Context and continuation of each option."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None


def question_of(
    record: Record, context: str, options: Iterable[str], gold: int, group: str | None = None, blank: str = " "
) -> Question:
    """A question whose options all follow the same context, after `blank`."""
    pairs = tuple((context, blank + option) for option in options)
    name = record.value.get("id", record.value.get("ind", record.name))
    return Question(str(name), context, "".join(pairs[gold]), group, pairs, {"gold": gold})


def whole(record: Record) -> Iterable[Record]:
    """A record that is one question."""
    return (record,)


@dataclass(frozen=True)
class QuestionReader:
    """How a set's records become questions."""

    data: DataForm
    read: Callable[[Record], Question | None]
    """None: a record of another part of the set. Raises Unreadable."""
    split: Callable[[Record], Iterable[Record]] = whole
    """One record to several, where a record is a passage or a file."""
    pinned: str | None = None
    """File of worked examples in `evaluation/prompts`, for where the data has none; in a form that `read` reads."""
    by_group: bool = False
    """Worked examples are of the question's own group."""
    held_out: bool = False
    """Without a split for them, each group's first records are the worked examples and are not asked."""
    role: Callable[[Question], Role] | None = None
    """Where one file holds several splits: which one a question is of."""

    def questions(
        self, name: str, source: Path | None, shots: int, limit: int | None
    ) -> tuple[list[tuple[Question, tuple[Question, ...]]], int]:
        """`limit` questions (see `spread`), each with its worked examples, and how many records were skipped.

        Raises:
            DataError: no data, or none that can be read.
            ConfigError: `shots` or `limit` is below zero or zero.
        """
        if shots < 0 or (limit is not None and limit < 1):
            raise ConfigError(f"{name}: shots is {shots} and limit {limit}: 0 or more shots, a limit of 1 or more")
        report = SkipReport()
        pool = self._examples(source, shots)
        asked = _with_unique_ids(self._asked(source, report, pool, shots))
        if not asked:
            first = (
                f" (the first of them: {report.skipped[0].name}: {report.skipped[0].reason})" if report.skipped else ""
            )
            place = source or (self.data.hub.dataset if self.data.hub else "")
            raise DataError(
                f"{place}: {name} finds no question there; {report.num_skipped} records were skipped{first}; "
                f"read are {self.data.forms}"
            )
        wanted = spread(asked, lambda question: question.group, limit)
        chosen = [(question, self._shots_of(question, pool, shots)) for question in wanted]
        fewest = min(len(examples) for _, examples in chosen)
        if fewest < shots:
            logger.warning(
                "%s: %d of %d worked examples: neither the data nor the package has more", name, fewest, shots
            )
        return chosen, report.num_skipped

    def _asked(self, source: Path | None, report: SkipReport, pool: list[Question], shots: int) -> Iterator[Question]:
        questions = self._read_all(self.data.asked_records(source, report), report)
        if self.role:
            every = list(questions)  # the examples may stand behind the questions
            if not pool:
                pool += [question for question in every if self.role(question) == "shot"]
            questions = iter([question for question in every if self.role(question) == "asked"])
        if not self.held_out or pool:
            yield from questions
            return
        held: dict[str | None, int] = {}
        for question in questions:
            if held.get(question.group, 0) < shots:
                held[question.group] = held.get(question.group, 0) + 1
                pool.append(question)
            else:
                yield question

    def _read_all(self, records: Iterable[Record], report: SkipReport) -> Iterator[Question]:
        for record in records:
            try:
                parts = list(self.split(record))
            except Unreadable as error:
                report.skip(record.where, str(error))
                continue
            for part in parts:
                try:
                    question = self.read(part)
                except Unreadable as error:
                    report.skip(part.where, str(error))
                    continue
                if question is not None:
                    yield question

    def _examples(self, source: Path | None, shots: int) -> list[Question]:
        if shots == 0:
            return []
        # Read further than needed: one that is asked is no example, and by group all groups must be met.
        most = None if self.by_group else shots + 1
        report = SkipReport()
        found = list(islice(self._read_all(self.data.shot_records(source, report), report), most))
        if found or self.pinned is None:
            return found
        text = (resources.files("finemoe.evaluation") / "prompts" / self.pinned).read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        records = [Record(json.loads(line), self.pinned, "pinned", n) for n, line in enumerate(lines, start=1)]
        return list(self._read_all(records, report))

    def _shots_of(self, question: Question, pool: list[Question], shots: int) -> tuple[Question, ...]:
        if shots == 0:
            return ()
        same = (shot for shot in pool if not self.by_group or shot.group == question.group)
        return tuple(islice((shot for shot in same if not _is_same(shot, question)), shots))


def _is_same(shot: Question, question: Question) -> bool:
    """An example that is the question itself would give the answer away."""
    return shot.worked == question.worked or (bool(question.prompt) and shot.prompt == question.prompt)


def spread(entries: Iterable[T], group: Callable[[T], str | None], limit: int | None) -> list[T]:
    """The first `limit` entries; of several groups as many of each as of any other, while they last.

    In the order given. What a smaller limit takes is among what a larger one does.
    """
    if limit is None:
        return list(entries)
    met: Counter[str | None] = Counter()
    found: list[tuple[int, int, T]] = []
    for place, entry in enumerate(entries):
        name = group(entry)
        if met[name] < limit:
            found.append((met[name], place, entry))
        met[name] += 1
    chosen = sorted(found, key=lambda entry: entry[:2])[:limit]
    return [entry for _, _, entry in sorted(chosen, key=lambda entry: entry[1])]


def _with_unique_ids(questions: Iterable[Question]) -> list[Question]:
    """Repeated ids get a number, whatever the limit: resuming and pairing go by the id."""
    seen: dict[str, int] = {}
    unique = []
    for question in questions:
        count = seen[question.id] = seen.get(question.id, 0) + 1
        unique.append(replace(question, id=f"{question.id}#{count}") if count > 1 else question)
    return unique


def put(question: str) -> str:
    """The question as it is put, whatever marks it came with."""
    plain = question.strip().removeprefix("Question:").removesuffix("Answer:").strip()
    return f"Question: {plain}\nAnswer:"


def preface(header: str, examples: Iterable[Question]) -> str:
    """What stands before the question: the header, then the worked examples, a blank line after each."""
    return header + "".join(example.worked + "\n\n" for example in examples)
