"""Answers found and compared: against known cases, exact arithmetic, brute force, and a judge that misbehaves."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.text.answers import (
    boxed,
    compare_latex,
    compare_numbers,
    drop_exact_match,
    drop_f1,
    exact_match,
    final_number,
    normalize_text,
    token_f1,
)
from finemoe.text.answers.judge import Judge, shared_judge


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He sold 48/2 = 24 clips.\n#### 24", "24"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("first #### 3 then\n#### $18.50", "18.5"),
        (r"so \boxed{\frac{1}{2}} of 9", "0.5"),
        (r"so \boxed{x = 1{,}024}", "1024"),
        ("The answer is 5.\n\nQ: There are 10", "5"),
        ("The answer is 3 + 4 = 7 apples, not 9", "7"),
        ("The answer is 6 (out of 10).", "6"),
        ("Answer: 1/3", "1/3"),
        ("He has 10 - 3 = 7.", "7"),
        ("3-5", "5"),
        ("it is -5", "-5"),
        ("it is −5", "-5"),
        ("it is -$1,000.00!", "-1000"),
        ("it is $-2", "-2"),
        ("50%", "50"),
        ("0.50", "0.5"),
        ("7.", "7"),
        (".25", "0.25"),
        ("item B12 costs 4 euro", "4"),
        ("no number", None),
        ("", None),
        ("The answer is (B)", None),
        ("1/0", None),
    ],
)
def test_the_number_a_solution_ends_on(text: str, number: str | None) -> None:
    assert final_number(text) == number


@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.booleans())
def test_a_number_comes_back_however_it_is_grouped(value: int, places: int, grouped: bool) -> None:
    exact = Fraction(value, 10**places)
    whole, rest = divmod(abs(value), 10**places)
    text = ("-" if value < 0 else "") + (f"{whole:,}" if grouped else str(whole))
    text += f".{rest:0{places}d}" if places else ""
    for said in (f"#### {text}", f"2 and 3, so the answer is {text}.", f"After 7 steps: \\boxed{{{text}}}."):
        found = final_number(said)
        assert found is not None
        assert Fraction(found) == exact
        assert compare_numbers(text, found) == "equal"


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{\frac{a}{b}} or \boxed{1+\sqrt{2}}", r"1+\sqrt{2}"),
        (r"$\boxed{\left\{1,2\right\}}$", r"\left\{1,2\right\}"),
        (r"\fbox{ x }", "x"),
        (r"\boxed 5$.", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxedtext{1}", None),
        ("nothing", None),
    ],
)
def test_the_last_box(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@given(
    st.recursive(
        st.sampled_from(["x", "1", r"\{", r"\}", "+"]), lambda e: st.lists(e).map(lambda p: "{" + "".join(p) + "}")
    )
)
def test_a_box_holds_what_was_put_in(inside: str) -> None:
    assert boxed(rf"a \boxed{{0}} so $\boxed{{{inside}}}$ }}") == inside


NUMBERS = [
    ("1/2", "0.5"), ("1/2", r"\frac12"), (r"\frac{1}{2}", r"\dfrac{1}{2}"), (r"\tfrac12", ".5"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", "-0.5"), (r"3\frac{1}{2}", "3.5"), ("3 1/2", "7/2"), ("-3 1/2", "-3.5"), (r"50\%", "0.5"),
    ("50", "50%"), ("1e3", "1,000"), (r"1.5\times 10^{3}", "1500"), (r"2 \cdot 10^{-2}", "0.02"), ("10^5", "100000"),
    ("1 000 000", "1000000"), ("1{,}234", "1234"), (r"90^\circ", "90"), ("$5", "5.00"), (r"\$5.50", "5.5"),
    ("5 cm", "5"), (r"5\text{ cm}^2", "5"), ("x = 7", "7"), ("+4", "4"), ("12.", "12"), ("−3", "-3"), ("seven", "7"),
    ("0.1", "1/10"), ("3/6", "1/2"), ("10000000000000000000001", "10000000000000000000001.0"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), NUMBERS)
def test_one_number_in_two_spellings(a: str, b: str) -> None:
    assert compare_numbers(a, b) == compare_numbers(b, a) == "equal"
    assert compare_latex(a, b) == compare_latex(b, a) == "equal"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1", "2"), ("0.3333", "1/3"), ("10000000000000000000001", "10000000000000000000000"), ("50%", "5"),
        (r"\frac{1}{3}", "0.333333333333333333333333"), ("1,234", "1.234"), ("-1", "1"), (r"3\frac12", "3/2"),
    ],
)  # fmt: skip
def test_numbers_that_floats_or_haste_would_confuse(a: str, b: str) -> None:
    assert compare_numbers(a, b) == compare_latex(a, b) == "different"


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "1e999999999", "1" * 5000, "1__0", "inf", "nan", r"\frac{1}{0}", "1.2.3"]
)
def test_what_is_no_number_is_unreadable(text: str) -> None:
    begun = time.monotonic()
    assert compare_numbers("2", text) == compare_numbers(text, "2") == "unreadable"
    assert time.monotonic() - begun < 1.0


@given(st.fractions(), st.fractions())
def test_comparison_is_that_of_fractions(a: Fraction, b: Fraction) -> None:
    def spell(value: Fraction) -> str:
        sign = "-" if value < 0 else ""
        return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"

    assert compare_numbers(str(a), spell(b)) == ("equal" if a == b else "different")


SAME = [
    (r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}{2}"), ("(1,2)", r"\left( 1,\, 2 \right)"), ("1, 2", "2,1"),
    (r"\{1, 2\}", "2, 1"), (r"\left\{\frac12, 3\right\}", r"\{3, 0.5\}"), ("x=5", "$5$"), (r"x \in [0,1)", r"[0, 1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"), (r"\text{even}", "Even"), (r"\text{(A)}", "A"),
    (r"\boxed{6 - 5i}", "6-5i"), (r"x \leq 3", r"x\le3"), ("2π", r"2\pi"), (r"\left(\frac12, 3\right)", "(0.5,3)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"), (r"\text{1 and 2}", r"1\text{ and }2"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME)
def test_one_answer_in_two_spellings(a: str, b: str) -> None:
    assert compare_latex(a, b) == compare_latex(b, a) == "equal"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
        ("[0,1)", "[0,1]"), ("1,2", "1,3"), ("1", "1,2"), (r"\{1\}", r"\{1,2\}"),
        (r"\text{even}", "odd"), ("A", "B"), ("5", "even"), ("(1,2)", "(1,2,3)"), (r"(-\infty,2)", r"(-\infty,3)"),
    ],
)  # fmt: skip
def test_answers_that_differ(a: str, b: str) -> None:
    assert compare_latex(a, b) == compare_latex(b, a) == "different"


@pytest.fixture
def no_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.text.answers.comparison.available", lambda: False)


@pytest.mark.usefixtures("no_math_verify")
@pytest.mark.parametrize(
    ("a", "b"), [("x^2+1", "1+x^2"), (r"2\sqrt{3}", r"\sqrt{12}"), ("xy", "yx"), ("x", None), ("x", " "), ("", "x")]
)
def test_what_cannot_be_told_is_unreadable_and_not_wrong(a: str, b: str | None) -> None:
    assert compare_latex(a, b) == "unreadable"


FAKE = """
import os, time
def parse(text, **options):
    text = text.strip("$")
    if "unread" in text: return []
    return [text]
def verify(gold, given, **options):
    assert options["timeout_seconds"] is None
    given = given[0]
    print("noise on standard output")
    if "hang" in given:
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: pass
    if "child" in given:
        import subprocess
        subprocess.Popen(["sleep", "97.125"])
        while True: time.sleep(1)
    if "raise" in given: raise TypeError("no such form")
    if "deep" in given: raise RecursionError
    if "memory" in given: bytearray(1 << 40)
    if "die" in given: os._exit(0)
    return sorted(gold[0]) == sorted(given)
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Judge()
    monkeypatch.setattr("finemoe.text.answers.comparison.shared_judge", lambda: made)
    monkeypatch.setattr("finemoe.text.answers.comparison.available", lambda: True)
    yield made
    made.close()


def living(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_the_judge_is_asked_only_where_we_cannot_tell(judge: Judge) -> None:
    assert compare_latex("1/2", "0.5") == "equal"
    assert compare_latex("1", "2") == "different"
    assert judge._process is None
    assert compare_latex("x^2+1", "1+x^2") == "equal"
    assert compare_latex("x^2+1", "1+x^3") == "different"
    assert compare_latex("x^2+1", "unread^2") == "unreadable"
    assert judge._process is not None


@pytest.mark.parametrize("trouble", ["hang", "child", "raise", "deep", "memory", "die"])
def test_a_judge_in_trouble_is_an_error_and_recovers(judge: Judge, trouble: str) -> None:
    assert compare_latex("a+b", "b+a") == "equal"
    begun = time.monotonic()
    assert compare_latex("a+b", f"{trouble}^2", 0.3) == "error"
    assert time.monotonic() - begun < 3.0
    until = time.monotonic() + 5.0  # a killed process is gone when the system comes round to it
    while living("sleep 97.125") and time.monotonic() < until:
        time.sleep(0.02)
    assert living("sleep 97.125") == []
    assert compare_latex("a+b", "b+a") == "equal"


def test_one_child_answers_many_questions(judge: Judge) -> None:
    compare_latex("a+b", "b+a")
    first = judge._process
    assert first is not None
    for number in range(200):
        assert compare_latex(f"a+{number}b", f"{number}b+a") == "equal"
    assert judge._process is first
    judge.close()
    assert first.poll() is not None


def test_a_judge_that_cannot_start_is_an_error(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('another version')")
    begun = time.monotonic()
    for _ in range(6):
        assert compare_latex("a+b", "b+a") == "error"
    assert time.monotonic() - begun < 20.0
    assert judge._process is None


def test_the_real_judge() -> None:
    pytest.importorskip("math_verify")
    assert compare_latex("x^2+1", "1+x^2", 30.0) == "equal"
    assert compare_latex(r"2\sqrt{3}", r"\sqrt{12}", 30.0) == "equal"
    assert compare_latex("x^2+1", "x^2+2", 30.0) == "different"
    assert compare_latex("9^{9^{9^{9^9}}}", "x+1", 1.0) == "error"
    shared_judge().close()


def test_words_as_squad_compares_them() -> None:
    assert normalize_text("  The  U.S.A., an Example! ") == "usa example"
    assert normalize_text("theater another") == "theater another"
    assert exact_match("The cat.", ["dog", "Cat"])
    assert not exact_match("cats", ["cat"])
    assert not exact_match("", [])
    assert token_f1("the cat sat", ["a cat"]) == pytest.approx(2 / 3)
    assert token_f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert token_f1("", ["the"]) == 1.0
    assert token_f1("", ["cat"]) == token_f1("cat", []) == 0.0


words = st.lists(st.sampled_from(["red", "green", "blue", "7"]), max_size=5).map(" ".join)


@given(words, words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(a: str, b: str) -> None:
    shared = sum(min(count, Counter(b.split())[word]) for word, count in Counter(a.split()).items())
    wanted = 0.0 if a or b else 1.0
    if shared:
        precision, recall = shared / len(a.split()), shared / len(b.split())
        wanted = 2 * precision * recall / (precision + recall)
    assert token_f1(a, [b]) == pytest.approx(wanted)
    assert token_f1(a, [b]) == pytest.approx(token_f1(b, [a]))


@pytest.mark.parametrize(
    ("text", "golds", "f1"),
    [
        ("10", [("10",)], 1.0),
        ("10.0", [("10",)], 1.0),
        ("10 yards", [("10",)], 0.67),
        ("11 yards", [("10 yards",)], 0.0),  # the number decides
        ("yards", [("10 yards",)], 0.0),
        ("the Bears", [("Bears",)], 1.0),
        ("Chicago-Bears", [("Chicago Bears",)], 1.0),
        ("Bears", [("Bears", "Lions")], 0.5),
        ("Bears", [("Lions",), ("Bears",)], 1.0),
        ("1,000", [("1000",)], 1.0),
        ("red red", [("red",)], 1.0),  # sets of words, not bags
        ("", [("red",)], 0.0),
    ],
)
def test_drop_f1(text: str, golds: list[tuple[str, ...]], f1: float) -> None:
    assert drop_f1(text, golds) == f1


@given(st.lists(words.filter(bool), min_size=1, max_size=3), st.lists(words.filter(bool), min_size=1, max_size=3))
def test_spans_are_matched_as_well_as_they_can_be(given_spans: list[str], gold: list[str]) -> None:
    from finemoe.text.answers.overlap import _aligned_f1, _drop_bag, _set_f1

    longer, shorter = sorted((given_spans, gold), key=len, reverse=True)
    best = max(
        sum(
            _set_f1(_drop_bag(a), _drop_bag(b)) if longer is given_spans else _set_f1(_drop_bag(b), _drop_bag(a))
            for a, b in zip(chosen, shorter, strict=True)
        )
        for chosen in permutations(longer, len(shorter))
    )
    assert _aligned_f1(given_spans, gold) == pytest.approx(best / len(longer), abs=0.0051)


def test_drop_exact_match() -> None:
    assert drop_exact_match("The 10.0", [("Lions",), ("10",)])
    assert not drop_exact_match("Bears", [("Bears", "Lions")])


def test_the_child_ends_by_itself_when_nobody_stops_it(judge: Judge) -> None:
    assert compare_latex("a+b", "b+a") == "equal"
    child = judge._process
    assert child is not None
    assert child.stdin is not None
    child.stdin.write(b'{"gold": "a", "given": "hang", "seconds": 0.0}\n')
    child.stdin.flush()
    assert child.wait(timeout=10) < 0
