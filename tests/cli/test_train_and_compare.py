"""What train, resume and compare hand over and print; the work itself is tested where it lives."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SUMMARY = {
    "final_validation_loss": 3.14159,
    "final_training_loss": 3.0,
    "steps": 1200,
    "tokens": 9_830_400,
    "seconds": 754.0,
    "tokens_per_second": 13037.7,
    "total_parameters": 1_945_856,
    "active_parameters": 526_592,
}


class Spy:
    """Stands in for a function and keeps what it was given."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.arguments, self.options = arguments, options
        return self.result


def run(summary: dict[str, Any], interrupted: bool = False) -> Spy:
    return Spy(SimpleNamespace(directory=Path("runs/[x]"), summary=summary, interrupted=interrupted))


@pytest.mark.usefixtures("here")
def test_train_hands_over_and_says_what_next(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = run(SUMMARY)
    monkeypatch.setattr("finemoe.runs.run.train", spy)
    result = command("train", "a.toml", "--set", "a.b=1", "--set", "c=x", "--out", "d", "-q")
    assert result.exit_code == 0
    assert spy.arguments == (Path("a.toml"),)
    assert spy.options == {"out": Path("d"), "overrides": ["a.b=1", "c=x"], "quiet": True, "go_on": False}
    for part in ("3.1416", "1.95M, 527K active", "9.83M tokens in 1,200 steps", "12 min 34 s", "runs/[x]"):
        assert part in result.stdout
    assert "finemoe generate 'runs/[x]'" in result.stdout


def test_an_interval_stands_behind_its_figure(command: Any, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    (here / "a.toml").touch()
    interval = {"final_validation_accuracy_low": 0.75, "final_validation_accuracy_high": 0.88}
    monkeypatch.setattr("finemoe.runs.run.train", run({**SUMMARY, "final_validation_accuracy": 0.83, **interval}))
    text = command("train", "a.toml").stdout
    assert "Validation accuracy  0.8300 (0.7500 to 0.8800)\n" in text
    assert "accuracy low" not in text
    assert "accuracy high" not in text


@pytest.mark.parametrize(
    ("method", "template", "told"),
    [
        ("reward", True, "in Python, finemoe.rewards('runs/judge', conversations)"),
        ("sft", True, "finemoe chat runs/judge"),
        ("pretraining", False, 'finemoe generate runs/judge --prompt "..."'),
    ],
)
def test_what_comes_next_is_what_the_method_made(
    command: Any, monkeypatch: pytest.MonkeyPatch, here: Path, method: str, template: bool, told: str
) -> None:
    (here / "a.toml").touch()
    (here / "runs/judge").mkdir(parents=True)
    (here / "runs/judge/config.json").write_text(json.dumps({"method": {"kind": method}}))
    if template:
        (here / "runs/judge/chat_template.jinja").write_text("x")
    done = Spy(SimpleNamespace(directory=Path("runs/judge"), summary=SUMMARY, interrupted=False))
    monkeypatch.setattr("finemoe.runs.run.train", done)
    assert f"\nNext: {told}\n" in command("train", "a.toml").stdout


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("verb", "path"), [("train", "a.toml"), ("resume", "x")])
def test_json_is_the_summary_and_nothing_else(
    command: Any, monkeypatch: pytest.MonkeyPatch, verb: str, path: str
) -> None:
    monkeypatch.setattr(f"finemoe.runs.run.{verb}", run({**SUMMARY, "max_vio": math.nan}))
    result = command(verb, path, "--json")
    expected = {"directory": "runs/[x]", "interrupted": False, **SUMMARY, "max_vio": None}
    assert json.loads(result.stdout) == expected


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupted_run_says_how_to_go_on(
    command: Any, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr("finemoe.runs.run.resume", run({}, interrupted=True))
    result = command("resume", "x", *options)
    assert result.exit_code == 130
    assert "finemoe resume 'runs/[x]'" in result.stderr
    if options:
        assert json.loads(result.stdout) == {"directory": "runs/[x]", "interrupted": True}
    else:
        assert result.stdout == ""


def compared(interrupted: bool = False) -> Spy:
    arm = {
        "label": "Dense",
        "validation_loss": {"mean": 3.2, "low": 3.1, "high": 3.3, "seeds": {"0": 3.2}},
        "total_parameters": 4e5,
        "active_parameters": 4e5,
        "max_vio": None,
        "directory": "arms/dense",
        "samples": [{"prompt": "def ", "completion": "f(x):\n    return x"}],
    }
    recipe = {"seeds": [3]}
    results = {
        "complete": not interrupted,
        "recipe": recipe,
        "arms": {"dense": arm},
        "pairs": [],
        "bad": math.inf,
    }
    return Spy(SimpleNamespace(directory=Path("runs/c"), results=results, interrupted=interrupted, failures={}))


def test_compare_prints_the_table_and_what_to_open(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = compared()
    monkeypatch.setattr("finemoe.studies.compare.compare", spy)
    result = command("compare", "--out", "runs/c", "--set", "seeds=[0, 1]")
    assert result.exit_code == 0
    assert spy.arguments == (None,)
    assert spy.options == {"out": Path("runs/c"), "overrides": ["seeds=[0, 1]"], "quiet": False}
    for part in ("Dense", "runs/c/report.html", "runs/c/results.csv", "runs/c/figures/", "runs/c/arms/dense/seed-3"):
        assert part in result.stdout
    assert "  | def f(x):\n  |     return x\n" in result.stdout


def test_what_to_run_after_the_demo_is_named_where_its_recipe_lies(
    command: Any, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """In 80 columns; the same command stands in the README, right behind `make demo`, and in `finemoe --help`."""
    monkeypatch.setattr("finemoe.studies.compare.compare", compared())
    assert "r1-zero" not in command("compare").stdout
    (here / "recipes").mkdir()
    (here / "recipes" / "r1-zero.toml").touch()
    said = command("compare").stdout
    again = "finemoe train recipes/r1-zero.toml --out runs/r1-zero"
    last = said.splitlines()[-2:]
    assert last == [f"Next  {again}", "      a model teaches itself to reason, in five to ten minutes"]
    assert max(map(len, last)) <= 80
    (told,) = [line for line in command("--help").stdout.splitlines() if again in line]
    assert "5-10 min" in told
    assert len(told) <= 80
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.index("make demo") < readme.index(again) < readme.index("finemoe train recipes/tiny.toml")


def test_compare_json_is_the_results(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.studies.compare.compare", compared())
    results = json.loads(command("compare", "--json").stdout)
    assert results["arms"]["dense"]["label"] == "Dense"
    assert results["bad"] is None


@pytest.mark.usefixtures("here")
def test_an_interrupted_comparison_says_how_to_go_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.studies.compare.compare", compared(interrupted=True))
    result = command("compare", "a.toml", "--set", "seeds=[0, 1]")
    assert result.exit_code == 130
    assert "finemoe compare a.toml --out runs/c --set 'seeds=[0, 1]'" in result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
@pytest.mark.parametrize(("verb", "target"), [("train", "runs.run.train"), ("compare", "studies.compare.compare")])
def test_a_recipe_that_is_a_pipe_is_left_for_the_one_who_reads_it(
    command: Any, monkeypatch: pytest.MonkeyPatch, here: Path, verb: str, target: str
) -> None:
    os.mkfifo(here / "pipe")  # nobody writes: reading it would hang
    spy = run(SUMMARY) if verb == "train" else compared(interrupted=True)
    monkeypatch.setattr(f"finemoe.{target}", spy)
    command(verb, "pipe")
    assert spy.arguments == (Path("pipe"),)
