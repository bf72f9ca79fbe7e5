"""Benchmarks whose answer is written out and read: how they are asked, and what a written answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finemoe.evaluation.forms.questions import Question, QuestionReader, preface
from finemoe.evaluation.task import Answer, Generate, Generated, Item, Judged

AnswerJudge = Callable[[Mapping[str, Any], str], Judged]
"""The worth of a written answer, given the item's facts."""


def written_item(question: Question, examples: Sequence[Question], header: str, request: Generate) -> Item:
    """The question after its worked examples, asked as `request` says; its prompt and suffix are filled in."""
    prompt = preface(header, examples) + question.prompt
    facts = {**question.facts, "shots": len(examples)}
    return Item(question.id, (replace(request, prompt=prompt, suffix=question.suffix),), facts, question.group)


def written(answers: Sequence[Answer]) -> Generated | Judged:
    """The one answer; or that there is none to judge, which is no wrong answer."""
    answer = answers[0] if len(answers) == 1 else None
    if not isinstance(answer, Generated) or not answer.texts:
        return Judged({}, "error", note="no text was generated for this item")
    return answer


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
        """At most `limit` questions and how many records were skipped; one request each."""
        wanted = self.shots if shots is None else shots
        found, skipped = self.reader.questions(self.name, source, wanted, limit)
        request = Generate("", self.stops, self.max_new_tokens)
        return [written_item(question, examples, self.header, request) for question, examples in found], skipped

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """The worth of what was written."""
        answer = written(answers)
        return answer if isinstance(answer, Judged) else self.worth(item.facts, answer.texts[0])
