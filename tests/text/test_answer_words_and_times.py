"""Numbers written as words, times of day, and blanks between numbers."""

from __future__ import annotations

import pytest

from finemoe.text.answers import compare_latex, compare_numbers, final_number


@pytest.mark.parametrize(
    ("words", "number"),
    [
        *(("seven", "7"), ("Twenty-one", "21"), ("ninety nine", "99"), ("Forty.", "40"), ("half", "0.5")),
        *(("one half", "1/2"), ("a third", "1/3"), ("a dozen", "12"), ("one hundred", "100"), ("eighty", "80")),
    ],
)
def test_a_number_may_be_written_as_words(words: str, number: str) -> None:
    assert compare_numbers(words, number) == "equal"
    assert compare_numbers(words, "22") == "different"


@pytest.mark.parametrize("words", ["twenty-ten", "twenty twenty", "one two", "hundredth", "half a dozen"])
def test_words_that_are_no_number_are_none(words: str) -> None:
    assert compare_numbers(words, "20") == "unreadable"


def test_no_part_of_a_time_is_a_number() -> None:
    assert final_number("The answer is 12:30") is None
    assert final_number("At 12:30 there were 7 of them") == "7"
    assert final_number("The ratio: 5") == "5"


def test_blanks_part_numbers_and_nothing_else() -> None:
    assert compare_latex("2 3", "23") != "equal"
    assert compare_latex("x + 1", "x+1") == "equal"
    assert compare_latex("1 000", "1000") == "equal"
    assert compare_latex(r"\frac{1}{2} x", r"\frac{1}{2}x") == "equal"
