"""One number, one word, one list, however people write them: the same to whoever reads it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.evaluation.tasks import closed_book, mathematics
from finemoe.text.answers import boxed, compare_latex, compare_numbers, compare_words, final_number
from finemoe.text.answers.words import split_list, word_form

SPELLINGS: dict[str, list[str]] = {
    "2.5": [
        "2 1/2", "5/2", r"2\frac{1}{2}", r"2 \frac12", r"2\dfrac{1}{2}", r"2\,\tfrac{1}{2}", "2½", "2 ½", "2 and 1/2",
        "2.50",
        r"\frac{5}{2}", r"\frac52", r"\frac{5}2", "2 1⁄2", "$2 1/2$", r"2\frac{1}{2} \text{ hours}", "2 1/2 hours",
        r"2.5\text{ cm}", "25e-1", r"25 \times 10^{-1}", "25 x 10^-1", "+2.5", "€2.50", r"\$2.50", "USD 2.50", "2.5.",
    ],
    "-1.5": [
        "-1 1/2", "−1½", "–1.5", "‑1.5", "- 1.5", "-$1.50", "$-1.50", r"-\frac32", r"-\frac{3}{2}", r"\frac{-3}{2}",
        r"\frac{3}{-2}", "minus 1.5", "negative 1 1/2", "-3/2", r"-1\frac{1}{2}", "－1.5",
    ],
    "1024": [
        "2^10", "2^{10}", "2**10", "2¹⁰", "1,024", "1 024", "1\u2009024", "1\u202f024", "1\u00a0024", "1_024", "1'024",
        r"1{,}024", r"1\,024", r"1,\!024", r"1\;024", "4^5", "1.024e3", "1.024 × 10³", r"1.024 \cdot 10^3", "1024.",
        "1024.00", r"1,024 \text{ bytes}", "1024 bytes", "１０２４", r"\frac{2^{11}}{2}", "1.024 thousand", "US$1,024",
    ],
    "1234567": [
        "1,234,567", "1 234 567", "1_234_567", r"1{,}234{,}567", r"1\,234\,567", r"1,\!234,\!567", "1.234567 million",
        "1\u2009234\u2009567",
    ],
    "0.001": ["10^{-3}", "10^-3", "1e-3", "1/1000", r"\frac{1}{1000}", "10⁻³", ".001", "0.001", r"\frac{1}{1,000}"],
    "1/3": [r"\frac13", r"\frac{1}{3}", "1/3", "⅓", "2/6", r"\cfrac{1}{3}", r"\frac 13", "(1)/(3)", "1 / 3"],
}  # fmt: skip


MIXED = ["{} {}/{}", r"{}\frac{{{}}}{{{}}}", "{} and {}/{}"]


@pytest.mark.parametrize(("value", "text"), [(value, text) for value, texts in SPELLINGS.items() for text in texts])
def test_every_reader_of_numbers_reads_the_same(value: str, text: str) -> None:
    assert compare_numbers(value, text) == compare_numbers(text, value) == "equal"
    assert compare_latex(value, text) == compare_latex(text, value) == "equal"
    assert compare_words(value, text) == "equal"
    assert compare_numbers("7", text) == compare_latex("7", text) == compare_words("7", text) == "different"
    for said in (
        f"The answer is {text}",
        f"It takes 9, so I say\n#### {text}",
        rf"so \boxed{{{text}}}",
        f"so = {text}",
    ):
        assert final_number(said) == value, said
    worth = mathematics._worth_of_number({"gold": value}, f"I think the answer is {text}.")
    assert (worth.scores, worth.outcome) == ({"accuracy": 1.0}, "answered")


@given(
    st.integers(0, 400), st.integers(1, 99), st.integers(2, 100), st.sampled_from(["{} {}/{}", r"{}\frac{{{}}}{{{}}}"])
)
def test_mixed_numbers_are_sums(whole: int, above: int, below: int, form: str) -> None:
    if above >= below:
        return
    value, text = whole + Fraction(above, below), form.format(whole, above, below)
    assert compare_numbers(str(value), text) == "equal"
    found = final_number(f"The answer is {text} hours.")
    assert found is not None
    assert Fraction(found) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It takes 1 1/2 hours", "1.5"), ("He ate 1/2 of it", "0.5"), (r"\boxed{1\frac{1}{2}}", "1.5"),
        ("The answer is 10 - 300", "10"), ("10 - 300", "300"), ("10 minus 3", "3"), ("in 2019 100 people came", "100"),
        ("on 1/2/2020", None), ("He ran 3.\n1/2 was left", "0.5"), ("2\n* 10^2 more", "100"),
        ("a 12 000 km trip", "12000"),
        ("2^1000000 is large", None), ("x_2", None), (r"\$3 \times 4", "4"), ("He paid $1.5 million.", "1500000"),
        ("3 cats, 4 dogs", "4"),
    ],
)  # fmt: skip
def test_numbers_within_text(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["2^2^2", "0^-1", "9^9999", "2^{1/2}", "1,23", "1__000", "12,34,567", "5 pi", "5 squared", "5 or 6", "5 dozen",
     "1/2/2020", "3-4", "5 am or pm", "5:30", "11 p.m.", "2x", "1 2 3", "--5", r"\frac{1}{2", "1/2/3"],
)  # fmt: skip
def test_what_is_not_one_number_is_not_read_as_one(text: str) -> None:
    assert compare_numbers("5", text) == "unreadable"


WORDS = [
    ("Monday", "Monday."), (r"\text{Yes}", "Yes."), (r"\text{No solution}", "no solution"),
    (r"\text{Evelyn}", "Evelyn."),
    ("yes", "YES!"), ("The cat", "cat"), (r"\text{Ellipse}", "an ellipse."), ("no solution", "No  solution"),
    (r"\textbf{Odd}", "odd"), ("well-known", "Well known"), ('"Paris"', "paris"), ("“Paris”", "Paris"),
    ("red, blue", "blue and red."), ("(A)", "(a)"), ("A", "a."), (r"\mbox{Saturday}", "saturday,"),
    ("I don’t know", "i don't know."),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "text"), WORDS)
def test_case_and_punctuation_make_no_other_word(gold: str, text: str) -> None:
    assert compare_latex(gold, text) == compare_latex(text, gold) == "equal"


@pytest.mark.parametrize(
    ("gold", "text"),
    [("Monday", "Tuesday."), ("Yes.", "no"), ("A", "b."), ("the", "an"), (r"\text{No solution}", "one solution."),
     ("red", "red and blue")],
)  # fmt: skip
def test_other_words_are_other_answers(gold: str, text: str) -> None:
    assert compare_latex(gold, text) == compare_latex(text, gold) == "different"
    assert compare_words(gold, text) == "different"


@pytest.mark.parametrize(
    ("gold", "text"),
    [("(A)", "A."), ("(B)", "(B) a bear"), ("True", "true."), ("8", "eight"), ("8", "8 objects."), ("-50", "−50"),
     ("] } >", "] } >"), ("arm bear", "Arm bear."), ("1000", "1,000"), ("Yes", "Yes!")],
)  # fmt: skip
def test_big_bench_hard_reads_numbers_and_words_as_the_others_do(gold: str, text: str) -> None:
    assert closed_book._worth_of_bbh({"gold": gold}, text).scores == {"exact_match": 1.0}
    assert closed_book._worth_of_bbh_in_steps({"gold": gold}, f"So the answer is {text}").scores == {"exact_match": 1.0}


@pytest.mark.parametrize(("gold", "text"), [("] } >", "] >"), ("(A)", "(B)"), ("8", "9"), ("arm bear", "bear arm")])
def test_big_bench_hard_still_tells_answers_apart(gold: str, text: str) -> None:
    assert closed_book._worth_of_bbh({"gold": gold}, text).scores == {"exact_match": 0.0}


LISTS = [
    ("1,2", r"1 \text{ and } 2"), ("2,3,4", "2, 3 and 4"), ("2, 3", r"x = 2 \text{ or } x = 3"), ("3, 5", "3 and 5"),
    ("2, 3", "3 or 2."), ("1,2,3", "1, 2, and 3"), ("1,2,3", "3, 1, or 2"), ("1, 2", "x = 1 or x = 2"),
    ("1, 2", "x=1, x=2"),
    ("1, 2", "x = 1, 2"), ("1, 2", r"x_1 = 1 \text{ and } x_2 = 2"), ("1; 2", "2, 1"), (r"\{1, 2\}", "1 and 2"),
    ("2, -2", r"\pm 2"), ("2, -2", r"x = \pm 2"), ("2, -2", "±2"), ("1,000, 2,000", "2,000 and 1,000"),
    ("0.5, 3", r"\frac{1}{2} \text{ and } 3"), ("1, 1/2", "1/2 and 1"), ("1, 1/2", "1 and 1/2"),
    (r"1 \text{ and } 2", r"1\text{ or }2"),
    ("3, 5", r"3\text{ cm and }5\text{ cm}"), ("(1,2), (3,4)", r"(3,4) \text{ and } (1,2)"), ("1, 2", r"1 \lor 2"),
    (r"\sqrt{2}, 3", r"3 \text{ and } \sqrt2"), ("1 2/3, 4", "4 and 5/3"), ("1,2", "1and2"),
    ("x=1, y=2", "y = 2 and x = 1"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "text"), LISTS)
def test_lists_joined_by_words_are_sets(gold: str, text: str) -> None:
    assert compare_latex(gold, text) == compare_latex(text, gold) == "equal"


@pytest.mark.parametrize(
    ("gold", "text"),
    [("1,2", r"1 \text{ and } 3"), ("2,3", "2 or 3 or 4"), ("2", "2 or 3"), ("1,2", "x = 1 or x = 3"),
     ("2, -3", r"\pm 2"),
     ("1,000", "1, 0"), ("(1,2)", r"(2,1)"), ("(100,200)", "(100,250)")],
)  # fmt: skip
def test_lists_with_other_parts_are_other_answers(gold: str, text: str) -> None:
    assert compare_latex(gold, text) == compare_latex(text, gold) == "different"


@pytest.mark.parametrize(("gold", "text"), [("x=1, y=2", "x=2, y=1"), ("p - q", "q - p"), ("ab", "ba")])
def test_what_only_looks_like_a_list_or_a_word_is_not_called_equal(
    gold: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.text.answers.comparison.available", lambda: False)
    assert compare_latex(gold, text) != "equal"


def test_drop_takes_lists_as_people_write_them() -> None:
    facts = {"golds": [["Lions", "Bears", "Tigers"]]}
    for text in ("Lions, Bears, and Tigers", "Tigers and Lions and Bears", "Bears, Lions, Tigers"):
        assert closed_book._worth_of_drop(facts, text).scores["exact_match"] == 1.0
    assert closed_book._worth_of_drop(facts, "Lions and Bears").scores["exact_match"] == 0.0


def test_parts_and_forms() -> None:
    assert split_list("1,234 and 5") == ["1,234", "5"]
    assert split_list("f(1, 2), sand") == ["f(1, 2)", "sand"]
    assert split_list("") == [""]
    assert word_form("The  Answer, is “Yes”.") == "answer is yes"
    assert word_form("a") == "a"
    assert boxed(r"\boxed{1\frac{1}{2}}") == r"1\frac{1}{2}"
