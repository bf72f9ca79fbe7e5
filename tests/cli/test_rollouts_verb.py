"""`finemoe rollouts`: what was answered, found again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import ConfigError, RunError
from finemoe.methods.grpo.reading import find_answers


def verdict(value: float | None) -> str:
    return "error" if value is None else "right" if value else "wrong"


def line(step: int, completion: str, value: float | None, advantage: float) -> str:
    answer = {
        "kind": "answer", "step": step, "rollout": step - 1, "group": 0, "prompt": "2+2\n", "completion": completion,
        "value": value, "rewards": {"answer": {"verdict": verdict(value), "note": "late" if value is None else ""}},
        "completion_ids": list(range(len(completion))), "advantages": [advantage] * len(completion),
    }  # fmt: skip
    return json.dumps(answer) + "\n"


def short(step: int, completion: str, value: float, advantage: float) -> str:
    """What is written of a rollout that is not kept whole."""
    answer = {
        "kind": "answer", "step": step, "rollout": step - 1, "group": 0, "item": 3, "prompt": "2+2\n",
        "references": ["4"], "completion": completion, "length": len(completion), "finish_reason": "stop",
        "value": value, "advantage": advantage, "rewards": {"answer": {"verdict": verdict(value), "note": ""}},
    }  # fmt: skip
    return json.dumps(answer) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rollouts.jsonl").write_text(
        json.dumps({"kind": "rollout", "step": 1, "rollout": 0}) + "\n"
        + line(1, "5", 0.0, -1.0) + line(1, "wait, 4", 1.0, 1.0)
        + line(11, "4", 1.0, 0.0) + line(11, "4\x1b[2J", None, 0)
        + '{"kind": "answer", "step": 21, "comp'
    )  # fmt: skip
    return tmp_path


def test_answers_are_found_by_what_they_say_and_are_worth(run: Path) -> None:
    def said(**asked: Any) -> list[str]:
        return [one["completion"] for one in find_answers(run, **asked)]

    assert said() == ["5", "wait, 4", "4", "4\x1b[2J"], "and a torn line is none"
    assert said(find="[Ww]ait") == ["wait, 4"]
    assert said(which="right") == ["wait, 4", "4"], "also where the whole group is right"
    assert said(which="wrong") == ["5"]
    assert said(which="better") == ["wait, 4"]
    assert said(which="worse") == ["5"]
    assert said(which="failed") == ["4\x1b[2J"]
    assert said(which="unreadable") == []
    assert said(steps=(2, 11)) == ["4", "4\x1b[2J"]
    assert said(steps=(2, None)) == ["4", "4\x1b[2J"]
    assert said(longest=True)[0] == "wait, 4"
    with pytest.raises(ConfigError, match="no regular expression"):
        said(find="(")
    with pytest.raises(
        ConfigError, match="which 'rihgt' is none of all, right, wrong, unreadable, better, worse, failed"
    ):
        said(which="rihgt")
    with pytest.raises(RunError, match=r"rollouts\.jsonl is not there"):
        list(find_answers(run / "elsewhere"))


def test_answers_that_are_kept_in_short_are_found_and_shown_too(run: Path, command: Callable[..., Any]) -> None:
    with (run / "rollouts.jsonl").open("a") as file:
        file.write("\n" + short(22, "is it 4?", 1.0, 1.5) + short(22, "it is 7, or not", 0.0, -0.5))
    found = list(find_answers(run, steps=(22, 22)))
    assert [one["advantage"] for one in found] == [1.5, -0.5]
    assert [one["completion"] for one in find_answers(run, which="better")] == ["wait, 4", "is it 4?"]
    assert next(iter(find_answers(run, longest=True)))["completion"] == "it is 7, or not"
    assert "step 22, group 0: worth 1, 8 tokens" in command("rollouts", run, "--from", "22").stdout


def test_a_question_is_shown_as_it_was_asked(run: Path, command: Callable[..., Any]) -> None:
    path = run / "rollouts.jsonl"
    path.write_text(line(1, "4", 1.0, 1.0).replace('"prompt": ', '"asked": "User: 2+2\\nYou:", "prompt": '))
    assert "\nUser: 2+2\nYou:\n4\n" in command("rollouts", run).stdout


def test_the_verb_shows_them(run: Path, command: Callable[..., Any]) -> None:
    done = command("rollouts", run, "--limit", "1", "--which", "failed")
    assert done.exit_code == 0
    assert "step 11, group 0: could not be judged, 5 tokens (answer: late)" in done.stdout
    assert "\x1b[2J" not in done.stdout
    assert "3 more" not in done.stdout
    assert "2 shown, 2 more: --limit N, --per-group N" in command("rollouts", run, "--limit", "2").stdout
    assert "No answer is like that." in command("rollouts", run, "--find", "zebra").stdout
    assert "No answer is like that: kept are those of steps 1, 11." in command("rollouts", run, "--from", "12").stdout
    found = command("rollouts", run, "--find", "4$", "--json").stdout.splitlines()
    assert [json.loads(one)["completion"] for one in found] == ["wait, 4", "4"]
    assert command("rollouts", run, "--which", "some").exit_code == 2


def test_few_answers_to_each_question_are_shown_and_what_is_right(run: Path, command: Callable[..., Any]) -> None:
    known = line(1, "3", 0.0, -1.0).replace('"prompt": ', '"references": ["4", "four"], "prompt": ')
    (run / "rollouts.jsonl").write_text(known * 5 + line(1, "9", 0.0, -1.0).replace('"group": 0', '"group": 1'))
    shown = command("rollouts", run).stdout
    assert "3 shown, 3 more: --per-group N" in shown
    assert shown.count("2+2\n3\nright: 4 or four\n") == 2
    assert shown.count("right: ") == 2, "of the other nothing is known"
    assert "5 shown, 1 more" in command("rollouts", run, "--per-group", "4").stdout


def judged(completion: str, **verdicts: str) -> str:
    answer = json.loads(line(1, completion, 1.0, 0.0))
    return json.dumps({**answer, "rewards": {name: {"verdict": one} for name, one in verdicts.items()}}) + "\n"


def test_what_is_right_is_said_by_the_reward_that_compares(run: Path) -> None:
    """Not by a judge's taste that stands before it, nor by a form behind it; without a configuration by the first."""

    def said(which: Any) -> list[str]:
        return [one["completion"] for one in find_answers(run, which=which)]

    (run / "rollouts.jsonl").write_text(
        judged("a", taste="right", sum="wrong", form="right")
        + judged("b", taste="wrong", sum="right", form="unreadable")
        + judged("c", taste="right", sum="unreadable", form="wrong")
        + judged("d", taste="right", sum="error", form="wrong")
    )
    assert said("right") == ["a", "c", "d"]
    kinds = {"taste": "reward_model", "sum": "number", "form": "format"}
    rewards = [{"kind": kind, "name": name} for name, kind in kinds.items()]
    (run / "config.json").write_text(json.dumps({"method": {"kind": "grpo", "rewards": rewards}}))
    assert (said("right"), said("wrong"), said("unreadable"), said("failed")) == (["b"], ["a"], ["c"], ["d"])


def test_what_is_shown_is_spread_over_the_steps(run: Path, command: Callable[..., Any]) -> None:
    """Ten answers of the first step said nothing of the nineteen behind it."""
    written = "".join(line(step, f"{step}/{number:x}", 1.0, 0.0) for step in range(1, 21) for number in range(16))
    (run / "rollouts.jsonl").write_text(written)

    def shown(*words: Any) -> list[str]:
        lines = command("rollouts", run, "--json", *words).stdout.splitlines()
        return [json.loads(one)["completion"] for one in lines]

    steps = [1, 3, 5, 7, 9, 11, 13, 15, 17, 20]
    assert shown("--from", "1", "--to", "20") == shown() == [f"{step}/0" for step in steps]
    assert shown("--to", "3", "--limit", "5") == ["1/0", "1/1", "2/0", "2/1", "3/0"]
    assert shown("--limit", "1") == ["1/0"]
    assert shown("--find", "/", "--limit", "3") == ["1/0", "1/1", "2/0"], "the first ones that say so"
    assert shown("--longest", "--limit", "3") == ["20/0", "20/1", "19/0"], "of equal ones the newest"


def test_the_help_says_what_the_last_step_is(command: Callable[..., Any]) -> None:
    said = command("rollouts", "--help").stdout
    assert "(the last)" in said
    assert "2147483648" not in said


def test_of_stages_the_one_that_has_answers_is_read(run: Path, command: Callable[..., Any]) -> None:
    for name in ("1-base", "3-zero", "5-again"):
        (run / name).mkdir()
        (run / name / "config.json").touch()
    (run / "config.json").unlink(missing_ok=True)
    (run / "rollouts.jsonl").rename(run / "3-zero" / "rollouts.jsonl")
    assert len(list(find_answers(run))) == 4
    assert "step 1, group 0" in command("rollouts", run).stdout
    (run / "5-again" / "rollouts.jsonl").touch()
    done = command("rollouts", run)
    assert done.exit_code == 2
    assert f"several runs in it have answers; name one of them: {run / '3-zero'}, {run / '5-again'}" in done.stderr
    (run / "1-base").rename(run / "other")
    with pytest.raises(RunError, match=r"rollouts\.jsonl is not there"):  # of runs that are no stages none is meant
        list(find_answers(run))


@pytest.mark.parametrize("verb", ["show", "rollouts", "resume"])
@pytest.mark.parametrize("names", [("a", "b"), ("1-base", "2-zero")])
def test_a_folder_of_runs_says_which_it_holds_and_how_stages_go_on(
    tmp_path: Path, command: Callable[..., Any], verb: str, names: tuple[str, str]
) -> None:
    for name in names:
        (tmp_path / name / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    are_stages = names[0] == "1-base"
    done = command(verb, tmp_path, *(("--out", tmp_path / "page") if verb == "show" and are_stages else ()))
    assert done.exit_code == 2
    listed = f"{tmp_path / names[0]}, {tmp_path / names[1]}"
    assert f"{tmp_path}: holds several runs; name one of them: {listed}" in done.stderr
    assert (f"`finemoe train RECIPE --out {tmp_path}`" in done.stderr) == are_stages
