"""The speed of GRPO: its arithmetic on made-up steps, both sides of it at tiny sizes, and TRL where there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from benchmarks.grpo_own import Own, recipe
from benchmarks.grpo_trl import Rewards, worth
from benchmarks.grpo_trl import arguments as of_trl
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import grpo_speed as bench
from finemoe.judging.comparing import NumberReward, number
from finemoe.judging.verdicts import Answer, Bounds

TRL = os.environ.get("FINEMOE_TRL")


def step(reward: float, seconds: float = 1.0, tokens: int = 10) -> dict[str, Any]:
    return {"reward": reward, "seconds": seconds, "tokens": tokens}


def job(steps: int, answers: int = 32) -> dict[str, Any]:
    prompts = [{"text": f"{n}=\n", "ids": [1] * 4, "right": "0"} for n in range(5)]
    return {"prompts": prompts, "settings": {**bench.SETTINGS, "steps": steps, "answers": answers}}


class Fake:
    """A side whose rewards are known."""

    def __init__(self, name: str, rewards: list[float], asked: list[str], prompts: list[int] | None = None) -> None:
        self.name, self.rewards, self.asked, self.prompts = name, rewards, asked, prompts

    def ask(self, do: str) -> dict[str, Any]:
        self.asked.append(self.name)
        found: dict[str, Any] = {"seconds": 2.0, "reward": self.rewards.pop(0), "answer_tokens": 100}
        return found if self.prompts is None else {**found, "prompts": self.prompts}


# what is said of steps


def test_the_goal_is_a_mean_of_three_steps_and_every_step_counts_until_then() -> None:
    steps = [step(1.0, 5.0), step(0.2), step(0.9), step(0.8, 3.0), step(1.0, 2.0), step(0.0)]
    assert bench.reached(steps) == (5, 12.0)
    assert bench.reached(steps[:4]) is None
    assert bench.reached([step(1.0), step(1.0)]) is None


def test_rates_are_of_steps_that_both_did_without_the_first() -> None:
    ours = [step(0, 9.0), step(0, 9.0), step(0, 2.0, 100), step(0, 4.0, 100), step(0, 1.0, 100)]
    theirs = [step(0, 1.0), step(0, 1.0), step(0, 4.0, 100), step(0, 4.0, 200)]
    row = bench.rate_row(3, {"finemoe": ours, "TRL": theirs}, 2)
    assert row.peer is not None
    assert (row.ours.samples, row.peer.samples, row.values) == ([50.0, 25.0], [25.0, 50.0], [2.0, 0.5])
    assert row.higher


def test_every_seed_says_in_how_many_steps_and_seconds_both_came_there() -> None:
    (row,) = bench.goal_rows(3, {"finemoe": (40, 5.0), "TRL": (38, 6.0)})
    assert row.peer is not None
    assert (row.ours.samples, row.peer.samples, row.values) == ([5.0], [6.0], [1.2])
    assert (row.what, row.note) == ("seconds to 0.9, seed 3, TRL / finemoe", "40 and 38 steps")
    assert bench.goal_rows(3, {"finemoe": (40, 5.0), "TRL": None}) == []


def test_sides_take_turns_until_each_is_there() -> None:
    asked: list[str] = []
    peers: Any = {"a": Fake("a", [1.0] * 9, asked), "b": Fake("b", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], asked)}
    found = bench.race(job(steps=9), peers, least=2)
    assert asked == ["a", "b", "b", "a", "a", "b", "b", "b", "b"]
    assert [len(one) for one in found.values()] == [3, 6]
    assert found["a"][0]["tokens"] == 100 + 2 * 4 * 16  # two prompts of four tokens, each read for 16 answers


def test_a_side_that_was_asked_something_else_ends_the_comparison() -> None:
    peers: Any = {"a": Fake("a", [0.0] * 3, [], prompts=[0, 1])}
    with pytest.raises(RuntimeError, match="a was asked other prompts in step 2"):
        bench.race(job(steps=3), peers, least=2)
    right: Any = {"a": Fake("a", [0.0], [], prompts=[0, 1])}
    assert "prompts" not in bench.race(job(steps=1), right, least=1)["a"][0]


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--steps", "4"], ["--only", "nothing"]])
def test_arguments_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.arguments(words)
    assert left.value.code == 2
    assert "error" in capsys.readouterr().err


# both sides


@given(st.text(alphabet="01234<>=\n", max_size=20))
def test_both_sides_judge_alike_what_the_task_is_answered_with(text: str) -> None:
    judge = number(NumberReward(), Bounds())
    answer = Answer("31=\n", text, True, 1, {}, ("4",))
    assert worth(text, "4") == judge(answer).value


def test_trl_is_asked_for_what_we_are_asked_for(tmp_path: Path) -> None:
    told = {**bench.SETTINGS, "steps": 7}
    theirs = of_trl(told, 5, tmp_path)
    ours = recipe({"settings": told, "seed": 5, "model": "m", "corpus": {}})
    assert (theirs["seed"], theirs["max_steps"]) == (ours["seed"], ours["training"]["steps"]) == (5, 7)
    assert theirs["beta"] == ours["method"]["beta"] == 0.04
    assert theirs["num_generations"] == ours["method"]["group"] == 16
    assert theirs["max_completion_length"] == ours["method"]["answer_tokens"] == 20
    assert theirs["learning_rate"] == ours["optimizer"]["learning_rate"] == 2e-5
    assert theirs["weight_decay"] == ours["optimizer"]["weight_decay"] == 0
    assert [theirs["adam_beta1"], theirs["adam_beta2"]] == ours["optimizer"]["betas"]
    answers = ours["training"]["tokens_per_step"] / ours["data"]["sequence_length"]
    assert theirs["per_device_train_batch_size"] == answers == 128


def test_trls_rewards_remember_what_they_saw() -> None:
    rewards = Rewards()
    values = rewards(completions=["1", "0"], completion_ids=[[5, 0], [4]], answer=["1", "1"], number=[3, 3], prompts=[])
    assert values == [1.0, 0.0]
    assert rewards.last == {"reward": 0.5, "answer_tokens": 3, "prompts": [3]}


def test_rollouts_and_the_engine_write_the_same() -> None:
    found = bench.Found()
    bench.rollouts(found, quick=True, repeats=2)
    assert [row.what for row in found.rows] == [f"rollouts, {one}, 32 at once / engine" for one in found.details]
    assert list(found.details) == ["dense", "mixture"]
    for row in found.rows:
        assert len(row.values) == 2
        assert min(row.values) > 0
    assert all(one["same_answers"] == 1.0 for one in found.details.values())


def test_answers_of_other_lengths_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bench.by_engine
    monkeypatch.setattr(bench, "by_engine", lambda *asked: [one[:-1] for one in honest(*asked)])
    with pytest.raises(RuntimeError, match="not every answer is of 4 tokens"):
        bench.rollouts(bench.Found(), quick=True, repeats=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.student(tmp_path_factory.mktemp("student"), quick=True, width=32)


def test_ours_answers_the_prompts_of_the_job_in_their_order(model: Path) -> None:
    told = bench.job_of(model, 0, 2, quick=True)
    own = Own(told)
    try:
        first = own.step()
        rollout = own.method.data._rollout  # type: ignore[attr-defined]
        asked = [list(one.drawn.prompt) for one in rollout.answers]
        assert asked == [told["prompts"][one // 16]["ids"] for one in range(32)]
        assert first["answer_tokens"] == sum(len(one.drawn.completion) for one in rollout.answers)
        assert first["reward"] == sum(one.value for one in rollout.answers) / 32
        assert own.step()["seconds"] > 0
        assert own.trainer.state.step == 2
    finally:
        own.method.close()


def test_the_model_is_made_once(model: Path) -> None:
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert bench.student(model.parent, quick=True, width=32) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_without_trl_the_rest_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench.main(["--quick", "--trl", "/nowhere/python", "--out", str(out)]) == 0
    assert "names no Python that has trl" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [row["part"] for row in written["rows"]] == ["rollouts", "rollouts"]
    assert {"date", "machine", "load_average"} <= written.keys()


@pytest.mark.slow
@pytest.mark.skipif(TRL is None, reason="FINEMOE_TRL names no Python that has trl")
def test_trl_trains_on_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--quick", "--only", "whole", "--width", "32", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert bench.main(words) == 0
    found = json.loads(out.read_text())["details"]["whole"]["seeds"]["0"]
    sides, steps = found["sides"], found["steps"]
    assert sides["finemoe"]["parameters"] == sides["TRL"]["parameters"] > 0
    assert sides["TRL"]["choices"]["use_cache"] is True
    assert sides["TRL"]["choices"]["threads"] == sides["finemoe"]["choices"]["threads"] == 1
    assert {name: len(one) for name, one in steps.items()} == {"finemoe": 2, "TRL": 2}
    for one in (one for each in steps.values() for one in each):
        assert one["seconds"] > 0
        assert 0 < one["answer_tokens"] <= 32 * 20
        assert one["tokens"] == one["answer_tokens"] + 32 * 8  # six digits, "=", and the end of the line
