"""The examples of docs/howto/add-a-reward.md, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from finemoe.data.problems import Draws, problem_at
from finemoe.judging.verdicts import Bounds
from judging.judged import answer, judge

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-reward.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def names_of(word: str) -> dict[str, Any]:
    """What the one example that holds `word` defines."""
    (block,) = [block for block in BLOCKS if word in block]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_the_function_of_the_page(tmp_path: Path) -> None:
    path = tmp_path / "my_rewards.py"
    path.write_text(next(block for block in BLOCKS if "def score" in block))
    said = judge("function", path=f"{path}:score")
    right = said(answer("it is 42", record={"answer": "42"}))
    assert (right.verdict, right.value, right.note) == ("right", 1, "it says 42")
    assert said(answer("it is 41", record={"answer": "42"})).verdict == "wrong"
    assert said(answer(" ", record={"answer": "42"})).verdict == "unreadable"


def test_the_function_of_the_page_judges_the_problems_of_the_recipe(tmp_path: Path) -> None:
    """And both pages state the prompt to the letter."""
    path = tmp_path / "my_rewards.py"
    path.write_text(next(block for block in BLOCKS if "def score" in block))
    said = judge("function", path=f"{path}:score")
    for number in range(20):
        problem = problem_at("running_sum", 2, number, 6)
        for text in (problem.answer, problem.solution):
            assert said(answer(text, record={"answer": problem.answer})).value == 1, text
        wrong = f"{problem.solution[:-1]}{(int(problem.answer) + 1) % 5}"
        assert said(answer(wrong, record={"answer": problem.answer})).value == 0
    assert re.fullmatch(r"\d{6}=\n", problem.prompt)
    for page in (PAGE, PAGE.with_name("teach-to-reason.md")):
        assert r'"204130=\n"' in page.read_text(encoding="utf-8"), page.name
    total, steps = 2, []
    for digit in (0, 4, 1, 3, 0):
        total = (total + digit) % 5
        steps.append(f"{digit}{total}")
    assert f"<{''.join(steps)}>{total}" in PAGE.with_name("teach-to-reason.md").read_text(encoding="utf-8")


def test_the_call_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    names_of("def main")["main"]()
    assert capsys.readouterr().out == "1.2 right\n"


def test_the_kind_of_the_page() -> None:
    names = names_of("class EndsReward")
    said = names["ends"](names["EndsReward"](), Bounds())
    assert said(answer("yes")).verdict == "right"
    assert said(answer("")).verdict == "unreadable"


def test_the_problem_of_the_page() -> None:
    found = names_of("def backwards")["backwards"](Draws(0), 5)
    letters = found.prompt.split()[0]
    assert found.answer == letters[::-1]
    assert len(letters) == 5
