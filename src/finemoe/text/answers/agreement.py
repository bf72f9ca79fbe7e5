"""Whether a completion says what a reference does, whatever kind of answer that is."""

from __future__ import annotations

import re

from finemoe.text.answers.comparison import boxed, compare_latex, compare_numbers, compare_words, final_number
from finemoe.text.answers.judge import Equality

_MARKED = re.compile(r"####|\banswer\s*(?:is|are|was|:|=)", re.IGNORECASE)


def stated_number(reference: str) -> str | None:
    """The number that a reference is, or leads to (`#### 42`, "the answer is 42"); None where it is no number."""
    number = final_number(reference) if _MARKED.search(reference) else reference
    return number if number is not None and compare_numbers(number, number) == "equal" else None


def agreement(completion: str, reference: str) -> Equality:
    r"""How a completion's answer compares with the reference.

    A reference with a box is compared with the completion's box, as LaTeX; one that is a number, or leads to one
    (`#### 42`, "the answer is 42"), with the number that the completion ends on; any other as words, all of them.
    `unreadable`: the completion has no such thing; `error`: math-verify failed, which says nothing.
    """
    if (gold := boxed(reference)) is not None:
        return compare_latex(gold, boxed(completion))
    if (number := stated_number(reference)) is not None:
        given = final_number(completion)
        return "unreadable" if given is None else compare_numbers(number, given)
    if (given := boxed(completion)) is not None:
        return compare_latex(reference, given)
    return compare_words(reference, completion.strip())


def says(completion: str, reference: str) -> bool:
    """Whether a completion's answer is the reference's, as `agreement` compares them."""
    return agreement(completion, reference) == "equal"
