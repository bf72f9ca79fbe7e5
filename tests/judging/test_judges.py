"""What each reward says: right, wrong, unreadable, error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import ConfigError
from finemoe.judging import KINDS
from finemoe.judging.verdicts import Answer
from judging.judged import answer, judge, verdict

THOUGHT = "<think>six by seven</think><answer>42</answer>"
CHECK = {"tests": ["assert f(2) == 4", "assert f(3) == 6"]}
GOOD = "def f(n):\n    return 2 * n\n"
STEPS = {"steps": ["1 + 2 = 3", "3 + 4 = 7"]}
CASES: list[tuple[str, dict[str, Any], str, Answer]] = [
    ("number", {}, "right", answer("so it is 1,234.", "1234")),
    ("number", {}, "right", answer("<0134>3", "3")),
    ("number", {}, "right", answer("it is 7", "5", "7.0")),
    ("number", {}, "right", answer("42", "6 * 7 is that\n#### 42")),
    ("number", {}, "wrong", answer("first 42, then 41", "42")),
    ("number", {}, "unreadable", answer("no idea", "42")),
    ("number", {}, "error", answer("42")),
    ("number", {}, "error", answer("42", "forty maybe")),
    ("latex", {}, "right", answer(r"thus \boxed{\frac{1}{2}}", "0.5")),
    ("latex", {}, "wrong", answer(r"\boxed{3}", r"\boxed{4}")),
    ("latex", {}, "unreadable", answer("0.5", "0.5")),
    ("latex", {}, "error", answer(r"\boxed{3}")),
    ("answer", {}, "right", answer("The answer is 42.", "42")),
    ("answer", {}, "right", answer(r"\boxed{x+1}", r"\boxed{x + 1}")),
    ("answer", {}, "right", answer("pear, then of fig\nfig pear", "fig pear")),
    ("answer", {}, "right", answer("<think>3 or 4</think><answer>the fox</answer>", "fox")),
    ("answer", {}, "wrong", answer("<think>42</think><answer>41</answer>", "42")),
    ("answer", {}, "wrong", answer("fig pear\npear fig", "fig pear")),
    ("answer", {}, "unreadable", answer(" \n", "42")),
    ("answer", {}, "unreadable", answer("x+1", r"\boxed{x+1}")),
    ("answer", {}, "error", answer("42")),
    ("expression", {}, "right", answer("3 - 1 = 2\n4 × (3 - 1) = 8", "4 * (3 - 1)")),
    ("expression", {}, "right", answer(r"\boxed{3 * 4 - 1 - 3}", "4 + 3 + 1 + 3 - 3 * 1", "(4 * 3) - (3 + 1)")),
    ("expression", {}, "wrong", answer("4 * 2", "4 * (3 - 1)")),
    ("expression", {}, "wrong", answer("4 * 3 - 1", "4 * (3 - 1)")),
    ("expression", {}, "wrong", answer("4 * (3 - 1) + 3 - 3", "4 * (3 - 1)")),
    ("expression", {}, "unreadable", answer("2 ** 2 ** 9", "4 * (3 - 1)")),
    ("expression", {}, "unreadable", answer("4 / (3 - 3)", "4 * (3 - 1)")),
    ("expression", {}, "unreadable", answer("(" * 400, "4 * (3 - 1)")),
    ("expression", {}, "unreadable", answer("", "4 * (3 - 1)")),
    ("expression", {}, "error", answer("4", "four")),
    ("expression", {}, "error", answer("4")),
    ("tests", {}, "right", answer(GOOD, record=CHECK)),
    ("tests", {}, "right", answer(f"So:\n```python\nf = 1\n```\nno,\n```python\n{GOOD}```\nDone.", record=CHECK)),
    ("tests", {}, "right", answer(GOOD, record={"test": "def check(g):\n    assert g(2) == 4", "entry_point": "f"})),
    ("tests", {}, "wrong", answer("def f(n):\n    return 4\n", record=CHECK)),
    ("tests", {}, "wrong", answer("```\ndef f(n:\n```", record=CHECK)),
    ("tests", {}, "unreadable", answer("I would double it.", record=CHECK)),
    ("tests", {}, "unreadable", answer("\n", record=CHECK)),
    ("tests", {}, "error", answer(GOOD)),
    ("tests", {}, "error", answer(GOOD, record={"tests": []})),
    ("steps", {}, "right", answer("1 + 2 = 3\n3 + 4 = 7\n7", record=STEPS)),
    ("steps", {}, "wrong", answer("1 + 2 = 3\n3 + 4 = 8\n8", record=STEPS)),
    ("steps", {}, "unreadable", answer("7", record=STEPS)),
    ("steps", {}, "error", answer("7")),
    ("steps", {}, "error", answer("7", record={"steps": "1 + 2 = 3"})),
    ("format", {}, "right", answer(f"  {THOUGHT}\n")),
    ("format", {}, "right", answer(THOUGHT.removeprefix("<think>"), prompt="Think.\n<think>\n")),
    ("format", {}, "wrong", answer(THOUGHT.removeprefix("<think>"))),
    ("format", {}, "wrong", answer(f"Well. {THOUGHT}")),
    ("format", {}, "wrong", answer(f"{THOUGHT} Bye.")),
    ("format", {}, "wrong", answer(THOUGHT.replace("six by seven", ""))),
    ("format", {}, "wrong", answer(THOUGHT.replace("six", "<think>"))),
    ("format", {}, "wrong", answer(THOUGHT.replace("</think>", ""))),
    ("format", {}, "wrong", answer(THOUGHT + "<answer>43</answer>")),
    ("format", {}, "unreadable", answer(" ")),
    ("format", {"form": "boxed"}, "right", answer(r"\boxed{3}")),
    ("format", {"form": "boxed"}, "wrong", answer(r"\boxed{3")),
    ("format", {"form": "markers", "opens": "<", "closes": ">"}, "right", answer("<11>1")),
    ("format", {"form": "markers", "opens": "<", "closes": ">"}, "wrong", answer("<11>")),
    ("format", {"form": "markers", "opens": "<", "closes": ">"}, "wrong", answer("<11>1>")),
    ("format", {"form": "markers", "opens": "<", "closes": ">"}, "wrong", answer("1")),
    ("language", {}, "right", answer("Two words: `x`, 12 and $\\alpha$.")),
    ("language", {"language": "zh"}, "right", answer("答案是 42 \\boxed{42} ```print```")),
    ("language", {"language": "ja"}, "right", answer("カタカナとひらがなと漢字")),
    ("language", {"language": "zh"}, "wrong", answer("答案是 the answer")),
    ("language", {}, "unreadable", answer("<0134>3")),
    ("length", {"longest": 10, "cushion": 4}, "right", answer("", tokens=6)),
    ("length", {"longest": 10, "cushion": 4}, "wrong", answer("", tokens=7)),
    ("length", {"longest": 10, "cushion": 4}, "unreadable", answer("", tokens=0)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "wanted", "given"), CASES)
def test_verdicts(kind: str, config: dict[str, Any], wanted: str, given: Answer) -> None:
    assert verdict(kind, given, **config) == wanted


def test_every_kind_is_judged_here_or_beside() -> None:
    assert {kind for kind, *_ in CASES} | {"function", "reasoning_gym"} == set(KINDS)


def test_a_kind_says_whether_it_compares_with_the_records_answer() -> None:
    """A study asks before it trains: what a kind does not say is met when the first stage is done."""
    configs = {kind: config for kind, config, *_ in CASES}
    lacks = {
        kind for kind, config in configs.items()
        if "no answer to compare with" in judge(kind, **config)(answer("42", record=CHECK | STEPS)).note
    }  # fmt: skip
    assert lacks == {kind for kind, one in KINDS.items() if one.compares}


def test_a_comparison_that_takes_too_long_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.text.answers.comparison.shared_judge", Failing)
    monkeypatch.setattr("finemoe.text.answers.comparison.available", lambda: True)
    given = answer(r"\boxed{x^2 - 1}", r"\boxed{(x-1)(x+1)}")
    assert verdict("latex", given) == "error"
    assert verdict("answer", given) == "error"


class Failing:
    def compare(self, gold: str, given: str, deadline_seconds: float) -> str:
        return "error"


def test_the_penalty_of_length_is_as_in_the_paper() -> None:
    """DAPO's eq. 13 with a longest of 20 and a cushion of 5."""
    said = judge("length", longest=20, cushion=5)
    values = [said(answer("", tokens=tokens)).value for tokens in (1, 14, 15, 16, 18, 20, 21, 500)]
    assert values == pytest.approx([0, 0, 0, -0.2, -0.6, -1, -1, -1])


def test_the_share_of_words_counts_each_chinese_letter_and_each_latin_word() -> None:
    said = judge("language", language="zh")
    assert said(answer("我们用GPT模型 today")).value == pytest.approx(5 / 7)
    assert judge("language", language="ru")(answer("это verification")).value == 0.5
    assert judge("language", language="en")(answer("ａｂｃ déjà vu")).value == 1


def test_steps_end_where_they_do() -> None:
    record = {"steps": ["23", "31", "40"]}
    exact = {"cut": 2, "opens": "<", "closes": ">"}
    good = judge("steps", **exact)(answer("<233140>0", record=record))
    assert (good.verdict, good.value, good.steps) == ("right", 1, ((3, 1), (5, 1), (7, 1)))
    bad = judge("steps", **exact)(answer("<23304012", record=record))
    assert (bad.verdict, bad.value) == ("wrong", 0.5)
    assert bad.steps == ((3, 1), (5, 0), (7, 1), (9, 0))  # what is too much is no right step
    short = judge("steps", **exact)(answer("<23>3", record=record))
    assert (short.value, short.steps) == (pytest.approx(1 / 3), ((3, 1),))  # what is missing has no place
    assert judge("steps", **exact)(answer("0", record=record)).verdict == "unreadable"


def test_steps_on_lines_of_their_own() -> None:
    said = judge("steps", cut="lines")(answer("1 + 2 = 3\n\n  3 + 4 = 8\n8\n", record=STEPS))
    assert said.steps == ((9, 1), (22, 0))
    assert said.value == 0.5


def test_a_step_that_is_missing_ends_with_the_answer() -> None:
    """And the others are looked for behind the last that was found."""
    record = {"steps": ["a", "x", "c", "a"]}
    said = judge("steps")(answer("a, b, c.", record=record))
    assert said.steps == ((1, 1), (7, 1), (8, 0), (8, 0))
    assert said.value == 0.5


def test_a_program_without_end_is_wrong_and_says_why() -> None:
    note = judge("tests")(answer("while True: pass", record=CHECK))
    assert note.verdict == "wrong"
    assert "timeout" in note.note


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("length", {"longest": 3, "cushion": 4}, "`cushion` 4 must be at most `longest` 3"),
        ("format", {"form": "markers", "opens": "<"}, "which needs both"),
        ("format", {"opens": "<", "closes": ">"}, 'belong to form = "markers"'),
        ("language", {"language": "klingon"}, "unknown language 'klingon'"),
        ("function", {"path": "r1-zero.toml:score"}, 'must be "FILE.py:FUNCTION"'),
        ("steps", {"cut": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KINDS[kind].config(**config)


RETURNS = {
    "0.25": ("right", 0.25), "-1": ("wrong", -1.0), "0": ("wrong", 0.0), "True": ("right", 1.0),
    "False": ("wrong", 0.0), "{'value': 2, 'note': 'n', 'steps': [(1, 0.5)]}": ("right", 2.0),
    "len(prompt) + len(completion) + record['a']": ("right", 7.0),
}  # fmt: skip


@pytest.mark.parametrize(("returned", "wanted"), RETURNS.items())
def test_a_function_of_ones_own(tmp_path: Path, returned: str, wanted: tuple[str, float]) -> None:
    path = tmp_path / "own_rewards.py"
    path.write_text(f"def score(prompt, completion, record):\n    return {returned}\n")
    said = judge("function", path=f"{path}:score")(answer("yes", record={"a": 3}))
    assert (said.verdict, said.value) == wanted
    if "note" in returned:
        assert (said.note, said.steps) == ("n", ((1, 0.5),))


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("import nothing_of_that_name", "score", "ModuleNotFoundError"),
        ("def other(): pass", "score", "has no function score; it has other"),
        (
            "def score(a, b): pass",
            "score",
            r"own_rewards.py:score\(a, b\) is called with three arguments: write def score\(",
        ),
        (None, "score", "no such file"),
    ],
)
def test_a_file_that_fails_is_named(tmp_path: Path, source: str | None, name: str, words: str) -> None:
    path = tmp_path / "own_rewards.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=words):
        judge("function", path=f"{path}:{name}")
