"""Rewards that compare an answer with what is right: as a number, as LaTeX, as whatever it is, as an expression."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged, Weighted
from finemoe.text.answers import Equality, agreement, boxed, compare_latex, compare_numbers, final_number, stated_number

_NO_REFERENCE = "its record has no answer to compare with"
_LONGEST = 300  # characters of an expression


class NumberReward(Weighted):
    """Right where the number that an answer ends on is the reference's."""

    kind: Literal["number"] = "number"


class LatexReward(Weighted):
    r"""Right where an answer's `\boxed{...}` is the reference's, as LaTeX; the `[eval]` extra knows more formulas."""

    kind: Literal["latex"] = "latex"


class AnswerReward(Weighted):
    r"""Right where an answer says what the reference does: a box as LaTeX, a number by its value, else words.

    Where there is `<answer>...</answer>`, that is what is read; words may also be an answer's last line.
    """

    kind: Literal["answer"] = "answer"


class ExpressionReward(Weighted):
    """Right where an answer ends with an expression of the reference's numbers, each as often, and of its value."""

    kind: Literal["expression"] = "expression"


def number(config: NumberReward, bounds: Bounds) -> Judge:
    """Unreadable: no number in it. Error: no reference is a number."""

    def judge(answer: Answer) -> Judged:
        wanted = [found for one in answer.references if (found := stated_number(one)) is not None]
        if not wanted:
            return Judged.error(_NO_REFERENCE if not answer.references else "no reference is a number")
        given = final_number(answer.text)
        if given is None:
            return Judged.unreadable("no number")
        return Judged.whether(any(compare_numbers(one, given) == "equal" for one in wanted), f"ends on {given}")

    return judge


def latex(config: LatexReward, bounds: Bounds) -> Judge:
    """Unreadable: no box, or one that cannot be compared. Error: no reference, or math-verify failed."""

    def judge(answer: Answer) -> Judged:
        given = boxed(answer.text)
        if not answer.references:
            return Judged.error(_NO_REFERENCE)
        if given is None:
            return Judged.unreadable("no box")
        seconds = bounds.deadline_seconds / 2
        return _verdict([compare_latex(boxed(one) or one, given, seconds) for one in answer.references])

    return judge


def _verdict(found: Sequence[Equality]) -> Judged:
    """Of the comparisons with all references: one that is equal is enough, and an error is no wrong answer."""
    if "equal" in found:
        return Judged.whether(True)
    if "error" in found:
        return Judged.error("math-verify failed, or needed too long")
    return Judged.whether(False) if "different" in found else Judged.unreadable("no answer that can be compared")


def answer(config: AnswerReward, bounds: Bounds) -> Judge:
    """Unreadable: nothing but blanks. Error: no reference."""

    def judge(answer: Answer) -> Judged:
        if not answer.references:
            return Judged.error(_NO_REFERENCE)
        said = within(answer.text, "<answer>", "</answer>")
        text = answer.text if said is None else said
        if not text.strip():
            return Judged.unreadable("empty")
        last = text.strip().splitlines()[-1]
        return _verdict([agreement(part, one) for one in answer.references for part in dict.fromkeys((text, last))])

    return judge


def within(text: str, opens: str, closes: str) -> str | None:
    """What stands between the last `opens` and the `closes` behind it; None without them."""
    start = text.rfind(opens)
    end = text.find(closes, start + len(opens)) if start >= 0 else -1
    return text[start + len(opens) : end] if end >= 0 else None


def expression(config: ExpressionReward, bounds: Bounds) -> Judge:
    """Unreadable: its end is no expression. Error: no reference is one."""

    def judge(answer: Answer) -> Judged:
        wanted = [found for one in answer.references if (found := _read(one)) is not None]
        if not wanted:
            return Judged.error(_NO_REFERENCE if not answer.references else "no reference is an expression")
        given = _read(answer.text)
        if given is None:
            return Judged.unreadable("does not end with an expression of whole numbers")
        return Judged.whether(given in wanted, f"its value is {given[0]}")

    return judge


_SAYS = re.compile(r"^.*\banswer\s*(?:is|:)?", re.IGNORECASE)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_EXPRESSION = re.compile(r"[\d+\-*/() ]+")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def _read(text: str) -> tuple[Fraction, Counter[int]] | None:
    """The value of the expression that a text ends with, and its numbers; None where it ends with none."""
    part = within(text, "<answer>", "</answer>") or boxed(text) or text
    lines = part.strip().splitlines()
    if not lines:
        return None
    said = _SAYS.sub("", lines[-1]).split("=")[0].translate(_SIGNS).strip(" .$`")
    if len(said) > _LONGEST or not _EXPRESSION.fullmatch(said):
        return None
    numbers: Counter[int] = Counter()
    try:
        return _value(ast.parse(said, mode="eval").body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, numbers: Counter[int]) -> Fraction:
    """Of an expression of + - * / and whole numbers, which are counted.

    Raises:
        ValueError: it is something else.
        ZeroDivisionError: it divides by zero.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        numbers[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    raise ValueError("no expression of + - * / and whole numbers")
