"""Benchmarks whose answer is written out and read: how they are asked, and what a written answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.evaluation.task import Answer, Generate, Generated, Item, Judged
from finemoe.evaluation.tasks.questions import QuestionReader, preface

AnswerJudge = Callable[[Mapping[str, Any], str], Judged]
"""The worth of a written answer, given the item's facts."""


@dataclass(frozen=True)
class GenerationTask:
    """A benchmark with free answers, greedy decoding."""

    name: str
    title: str
    metric: str
    shots: int
    reader: QuestionReader
    worth: AnswerJudge
    stops: tuple[str, ...]
    max_new_tokens: int
    header: str = ""
    chance: float | None = None

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """The first `limit` questions and how many records were skipped; one request each."""
        wanted = self.shots if shots is None else shots
        found, skipped = self.reader.questions(self.name, source, wanted, limit)
        items = []
        for question, examples in found:
            prompt = preface(self.header, examples) + question.prompt
            request = Generate(prompt, self.stops, self.max_new_tokens)
            facts = {**question.facts, "shots": len(examples)}
            items.append(Item(question.id, (request,), facts, question.group))
        return items, skipped

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """The worth of what was written."""
        answer = answers[0] if len(answers) == 1 else None
        if not isinstance(answer, Generated) or not answer.texts:
            return Judged({}, "error", note="no text was generated for this item")
        return self.worth(item.facts, answer.texts[0])
