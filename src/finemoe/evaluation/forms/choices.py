"""Multiple choice by the likelihood of the options.

Four ways to choose, all from the same pass, as each has its use: by the sum of log probabilities (`accuracy`), by
the sum over the option's characters (`accuracy_norm`; the harness's acc_norm), by the mean over its tokens
(`accuracy_token`: the option of least perplexity), and by how much the question raises the option's log probability
above what it is after the bare word before the answer (`accuracy_uncond`). Options that share the best value share
the credit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.evaluation.forms.questions import Question, QuestionReader, preface
from finemoe.evaluation.task import Answer, Item, Judged, LogLikelihood, Scored


def no_header(group: str | None) -> str:
    """Nothing before the first example."""
    return ""


@dataclass(frozen=True)
class ChoiceTask:
    """A multiple-choice benchmark."""

    name: str
    title: str
    metric: str
    shots: int
    chance: float | None
    reader: QuestionReader
    header: Callable[[str | None], str] = no_header
    """What the prompt starts with, by group."""
    unconditional: str | None = None
    """The bare context of the unconditional normalisation."""

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """At most `limit` questions and how many records were skipped; a request an option."""
        wanted = self.shots if shots is None else shots
        found, skipped = self.reader.questions(self.name, source, wanted, limit)
        return [self._item(question, examples) for question, examples in found], skipped

    def _item(self, question: Question, examples: tuple[Question, ...]) -> Item:
        before = preface(self.header(question.group), examples)
        requests = [LogLikelihood(before + context, continuation) for context, continuation in question.options]
        if self.unconditional is not None:
            requests += [LogLikelihood(self.unconditional, continuation) for _, continuation in question.options]
        facts: dict[str, Any] = {
            "gold": question.facts["gold"],
            "lengths": [len(continuation.removeprefix(" ")) for _, continuation in question.options],
            "shots": len(examples),
        }
        return Item(question.id, tuple(requests), facts, question.group)

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """The credit by each way to choose."""
        lengths: list[int] = item.facts["lengths"]
        gold: int = item.facts["gold"]
        scored = [answer for answer in answers if isinstance(answer, Scored)]
        if len(scored) != len(item.requests) or not all(math.isfinite(answer.logprob) for answer in scored):
            return Judged({}, "error", note="a log probability is missing or not finite")
        asked, bare = scored[: len(lengths)], scored[len(lengths) :]
        sums = [answer.logprob for answer in asked]
        scores = {
            "accuracy": credit(sums, gold),
            "accuracy_norm": credit([s / max(n, 1) for s, n in zip(sums, lengths, strict=True)], gold),
            "accuracy_token": credit([answer.logprob / max(answer.num_tokens, 1) for answer in asked], gold),
        }
        if bare:
            raised = [s - answer.logprob for s, answer in zip(sums, bare, strict=True)]
            scores["accuracy_uncond"] = credit(raised, gold)
        return Judged(scores)


def credit(values: Sequence[float], gold: int) -> float:
    """1 if the gold option has the highest value, shared evenly among those that have it too; else 0."""
    best = max(values)
    return 1.0 / sum(value == best for value in values) if values[gold] == best else 0.0
