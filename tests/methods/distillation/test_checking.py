"""What is worth learning: which completions say what their record holds to be right."""

from __future__ import annotations

import pytest

from finemoe.methods.distillation.checking import says, why_not


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("So it is 1,234.", "1234"),
        ("3 + 4 = 7", "7"),
        ("First 9, then the answer is 12.", "5 + 7 = 12\n#### 12"),
        (r"Thus \boxed{\frac{1}{2}}.", r"We find \boxed{1/2}"),
        (r"Thus \boxed{x+1}", "x+1"),
        ("Paris", "paris"),
        ("0.5", "1/2"),
        ("it is 42", "It is 42."),
    ],
)
def test_the_same_answer(completion: str, reference: str) -> None:
    assert says(completion, reference)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("7 is not it, 8 is", "7"),
        ("no number", "7"),
        (r"\boxed{3}, that is 2", r"\boxed{2}"),
        ("2", r"\boxed{2}"),
        ("Paris, I think", "Paris"),
        ("12", "12 of 1900"),
        ("the answer is 11", "#### 12"),
    ],
)
def test_another_answer(completion: str, reference: str) -> None:
    assert not says(completion, reference)


def test_why_one_is_not_kept() -> None:
    assert why_not("all", "x", False, ()) is None
    assert why_not("all", " \n", True, ()) == "empty"
    assert why_not("ended", "7", False, ("7",)) == why_not("answer", "7", False, ("7",)) == "did not end"
    assert why_not("ended", "8", True, ("7",)) is None
    assert why_not("answer", "8", True, ("7", "9")) == "another answer"
    assert why_not("answer", "9", True, ("7", "9")) is None
    assert why_not("answer", "9", True, ()) == "the record has no answer to compare with"
