"""Answers for the tests of this folder, and judges that run in the test's own process."""

from __future__ import annotations

from typing import Any

from finemoe.data.problems import Problem
from finemoe.judging import KINDS
from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged


def answer(
    text: str, *references: str, prompt: str = "?", tokens: int | None = None, record: dict[str, Any] | None = None
) -> Answer:
    return Answer(prompt, text, True, len(text.split()) if tokens is None else tokens, record or {}, references)


def to(problem: Problem, text: str) -> Answer:
    """`text` as an answer to a problem."""
    record = {"steps": list(problem.steps), "tests": None if problem.tests is None else list(problem.tests)}
    return Answer(problem.prompt, text, True, len(text), record, (problem.answer,))


def judge(kind: str, **config: Any) -> Judge:
    found = KINDS[kind]
    return found.make(found.config(**config), Bounds(2.0))


def verdict(kind: str, given: Answer, **config: Any) -> str:
    found: Judged = judge(kind, **config)(given)
    if found.verdict in ("unreadable", "error"):
        assert found.value == 0
        assert found.note
    return found.verdict
