"""Floor 2: how good an answer is, said in a process that may fail. A file or a function a kind, and a line in KINDS."""

from __future__ import annotations

from finemoe.judging import comparing, custom, programs, shape, steps
from finemoe.judging.verdicts import Kind

KINDS: dict[str, Kind] = {
    "answer": Kind(comparing.AnswerReward, comparing.answer, compares=True),
    "number": Kind(comparing.NumberReward, comparing.number, compares=True),
    "latex": Kind(comparing.LatexReward, comparing.latex, compares=True),
    "expression": Kind(comparing.ExpressionReward, comparing.expression, compares=True),
    "tests": Kind(programs.ProgramReward, programs.tests, supervised=True, may_fail=True),
    "steps": Kind(steps.StepsReward, steps.steps),
    "format": Kind(shape.FormatReward, shape.form),
    "language": Kind(shape.LanguageReward, shape.language),
    "length": Kind(shape.LengthReward, shape.length),
    "function": Kind(custom.FunctionReward, custom.function, may_fail=True),
    "reasoning_gym": Kind(custom.GymReward, custom.reasoning_gym, may_fail=True),
}
"""Rewards that look at one answer at a time."""
