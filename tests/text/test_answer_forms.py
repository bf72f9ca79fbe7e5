"""Answers as models write them: in bold letters, in words, with a comma for a point, joined by other words."""

from __future__ import annotations

import pytest

from finemoe.text.answers import compare_latex, compare_numbers, compare_words, final_number
from finemoe.text.answers.number_words import number_in_words


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("The answer is **12**.", "12"), ("**Answer: 12**", "12"), ("**Answer:** 12", "12"), ("#### **12**", "12")),
        *(("so **12** is less than **15**", "15"), ("The answer is __12__.", "12"), ("**$1,200**", "1200")),
        *(("It is 2**5", "32"), ("It is 2 ** 5", "32"), ("It is (2)**5.", "5")),
    ],
)
def test_bold_letters_hide_no_number_and_powers_stay(text: str, number: str) -> None:
    assert final_number(text) == number


def test_bold_letters_change_no_answer() -> None:
    assert compare_numbers("12", "**12**") == "equal"
    assert compare_latex("12", "**12**") == "equal"
    assert compare_latex("x^2", "x**2") == "equal"


@pytest.mark.parametrize(
    ("words", "number"),
    [
        *(("one hundred and five", "105"), ("two thousand five", "2005"), ("a hundred and one", "101")),
        *(("one million two hundred thousand", "1200000"), ("ten thousand", "10000"), ("minus five", "-5")),
        *(("twelve thousand three hundred forty-five", "12345"), ("one and a half", "1.5"), ("two thirds", "2/3")),
        *(("two and two thirds", "8/3"), ("three quarters", "0.75"), ("seven dollars", "7"), ("zero", "0")),
    ],
)
def test_numbers_in_words_are_read_whole(words: str, number: str) -> None:
    assert compare_numbers(words, number) == "equal"
    assert compare_numbers(str(final_number(f"So the answer is {words}.")), number) == "equal"


@pytest.mark.parametrize(
    "words", ["a", "a five", "five a", "and", "hundred", "one hundred hundred", "five and three", "one and", "thousand"]
)
def test_words_in_another_order_are_no_number(words: str) -> None:
    assert compare_numbers(words, "5") == "unreadable"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1.234.567", "1234567"), ("1.234.567,89", "1234567.89"), ("1.234,56", "1234.56"), ("1 234,56", "1234.56")),
        *(("3,50 euro", "3.5"), ("3,50 €", "3.5"), ("€3,50", "3.5"), ("1.250,00 EUR", "1250")),
        *(("1.234", "1.234"), ("1,234", "1234"), ("1,234.56", "1234.56"), ("$1,200", "1200"), ("1.5 X 10^3", "1500")),
    ],
)
def test_a_comma_is_a_point_where_nothing_else_can_be_meant(text: str, number: str) -> None:
    assert compare_numbers(text, number) == "equal"
    assert final_number(f"The answer is {text}.") == number


def test_commas_between_numbers_still_part_them() -> None:
    assert compare_latex("(1.234,5)", "(1.234, 5)") == "equal"
    assert compare_latex("3,50", "50,3") == "equal"
    assert compare_numbers("3,50", "3.5") == "unreadable"


@pytest.mark.parametrize(
    "given", ["2 & 3", r"2 \& 3", "2 as well as 3", "2 and also 3", "both 2 and 3", "either 2 or 3", "3 and/or 2"]
)
def test_lists_are_joined_by_other_words_too(given: str) -> None:
    assert compare_latex("2, 3", given) == "equal"
    assert compare_latex(given, "2, 3") == "equal"
    assert compare_latex("2, 4", given) == "different"


def test_word_forms_know_initials_and_ampersands_and_the_empty_set() -> None:
    assert compare_words("U.S.", "US") == "equal"
    assert compare_words("5 p.m.", "5 pm") == "equal"
    assert compare_words("Smith & Jones", "Smith and Jones") == "equal"
    assert compare_words("(B)", "B)") == "equal"
    assert compare_words("(B)", "C)") == "different"
    assert compare_latex(r"\emptyset", "∅") == "equal"


@pytest.mark.parametrize(
    ("text", "value"), [("two thousand, three hundred", 2300), ("twenty, one", None), ("one, two", None)]
)
def test_a_comma_belongs_to_a_number_behind_its_thousands_alone(text: str, value: int | None) -> None:
    assert number_in_words(text) == value
