"""GRPO runs: what they learn from, what they write, and that they go on to the bit, in the middle of a rollout too."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.checkpoint.open import load_tokenizer
from finemoe.core.errors import CheckpointError, ConfigError, DataError
from finemoe.methods.grpo.reading import find_answers
from finemoe.methods.grpo.rollouts import Rollouts
from finemoe.runs.excerpts import data_excerpts
from finemoe.runs.run import resume, train
from finemoe.training.directory import read_metrics
from methods.grpo.tiny_policy import base, practising
from methods.tiny_talks import weights
from runs.tiny_runs import steps


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("grpo"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "two steps and two epochs on a rollout": {"steps_per_rollout": 2, "inner_epochs": 2, "replay": "update"},
    "replayed, renewed reference": {"replay": "rollout", "reference_every": 1, "inner_epochs": 2},
    "other prompts for dead groups": {"dynamic_sampling": 2, "beta": 0.0, "temperature": 0.8},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_to_the_bit(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """From a checkpoint that lies inside of a rollout, with answers of the weights that began it."""
    recipe = practising(start, WAYS[way])
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    real, calls = Rollouts.batch, []

    def torn(self: Rollouts, position: int, num: int) -> Any:
        calls.append(position)
        if position >= 3 * 8:
            raise KeyboardInterrupt
        return real(self, position, num)

    monkeypatch.setattr(Rollouts, "batch", torn)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "torn", quiet=True)
    monkeypatch.undo()
    resume(tmp_path / "torn", quiet=True)
    expected, found = weights(whole.directory), weights(tmp_path / "torn")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert lines(tmp_path / "torn") == lines(whole.directory)
    steps = [
        [one for one in read_metrics(run) if one["kind"] == "step"] for run in (whole.directory, tmp_path / "torn")
    ]
    assert [one["step"] for one in steps[1]] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(*steps, strict=True):
        assert one["loss"] == other["loss"]
        assert one["figures"]["reward"] == other["figures"]["reward"]


def test_what_a_step_reports(start: Path, tmp_path: Path) -> None:
    run = train(practising(start), out=tmp_path / "run", quiet=True)
    step = steps(run.directory)[0]
    for name in ("kl", "clip_share", "off_policy_kl", "entropy", "expert_mismatch"):
        assert name in step["terms"]
    assert step["terms"]["kl"] == pytest.approx(0, abs=1e-6), "the first step is of the reference itself"
    assert all(one["terms"]["off_policy_kl"] < 1e-8 for one in steps(run.directory)), "and so is every one on policy"
    assert step["terms"]["expert_mismatch"] == 0
    assert step["terms"]["clip_share"] == 0
    figures = step["figures"]
    assert figures["prompts_asked"] == 2
    recorded = next(one for one in read_metrics(run.directory) if one["kind"] == "step")
    assert 0 <= recorded["figures"]["time_rollout"] <= 1
    assert {"reward", "length", "cut_share", "failed_share", "dead_groups", "reward_function"} <= figures.keys()
    held = [one for one in read_metrics(run.directory) if one["kind"] == "validation"]
    assert "validation_reward" in held[-1]
    assert held[0]["samples"][0]["prompt"] == held[-1]["samples"][0]["prompt"]


def test_rollouts_are_data(start: Path, tmp_path: Path) -> None:
    """Complaint 13 of post-training: ids as they were drawn, whatever text they are."""
    run = train(practising(start), out=tmp_path / "run", quiet=True)
    found = lines(run.directory)
    assert [one["rollout"] for one in found if one["kind"] == "rollout"] == [0, 1, 2, 3, 4, 5]
    answers = [one for one in found if one["kind"] == "answer"]
    assert len(answers) == 6 * 8
    assert {one["rollout"] for one in answers if "routes" in one} == {0, 2, 4}, "every second is whole"
    tokenizer = load_tokenizer(run.directory)
    for one in answers:
        assert one["length"] <= 6
        assert one["references"]
        assert one["prompt"] == answers[4 * (answers.index(one) // 4)]["prompt"]
    for one in (one for one in answers if "routes" in one):
        assert one["length"] == len(one["completion_ids"])
        assert tokenizer.decode(one["prompt_ids"]) == one["prompt"]
        assert len(one["completion_ids"]) == len(one["logprobs"]) == len(one["advantages"])
        read = len(one["prompt_ids"]) + len(one["completion_ids"]) - 1
        assert one["routes"]
        assert all(len(layer) == read for layer in one["routes"].values())
    first = [one for one in answers if one["rollout"] == 0]
    for group in (0, 1):
        own = [one for one in first if one["group"] == group]
        assert len({tuple(one["prompt_ids"]) for one in own}) == 1
        assert sum(one["advantages"][0] for one in own) == pytest.approx(0, abs=1e-5)


def test_a_model_learns_what_is_rewarded(start: Path, tmp_path: Path) -> None:
    recipe = practising(
        start, {"group": 8, "beta": 0.0}, training={"steps": 40, "tokens_per_step": 32 * 32, "evaluate_every": 40}
    )
    run = train(recipe, out=tmp_path / "run", quiet=True)
    rewards = [one["figures"]["reward"] for one in steps(run.directory)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def failing(folder: Path) -> dict[str, Any]:
    """A reward that cannot judge answers of even length, and finds all others right."""
    path = folder / "half.py"
    path.write_text("def score(prompt, completion, record):\n    assert len(completion) % 2\n    return 1.0\n")
    return {"kind": "function", "path": f"{path}:score"}


def test_errors_leave_their_group(start: Path, tmp_path: Path) -> None:
    """Complaint 15 of post-training: a reward that fails costs its answer, and is learnt as no 0."""
    recipe = practising(start, {"rewards": [failing(tmp_path)], "beta": 0.0}, training={"steps": 2})
    run = train(recipe, out=tmp_path / "run", quiet=True)
    answers = [one for one in lines(run.directory) if one["kind"] == "answer"]
    failed = [one for one in answers if one["value"] is None]
    assert 0 < len(failed) < len(answers)
    assert not any(one["advantage"] for one in answers), "those that were judged are all alike"
    figures = steps(run.directory)[0]["figures"]
    assert figures["reward"] == 1.0
    assert figures["failed_share"] > 0
    assert [one["loss"] for one in steps(run.directory)] == [0, 0]


def test_a_rollout_with_errors_is_kept_and_goes_on(start: Path, tmp_path: Path) -> None:
    """What was scored of an answer that does not count is nothing."""
    method = {"rewards": [failing(tmp_path)], "inner_epochs": 2}
    recipe = practising(start, method, training={"steps": 4, "checkpoint_every": 1})
    whole = train(recipe, out=tmp_path / "whole", quiet=True)
    part = train({**recipe, "training": {**recipe["training"], "steps": 3}}, out=tmp_path / "part", quiet=True)
    resume(part.directory, overrides=["training.steps=4"], quiet=True)
    expected, found = weights(whole.directory), weights(part.directory)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_another_reference_is_refused(corpus: Path, tmp_path: Path) -> None:
    base_run = base(corpus, tmp_path)
    run = train(practising(base_run, training={"steps": 2}), out=tmp_path / "run", quiet=True)
    resume(base_run, overrides=["training.steps=4"], quiet=True)
    with pytest.raises(CheckpointError, match="holds another model than when this run began"):
        resume(run.directory, overrides=["training.steps=4"], quiet=True)


@pytest.mark.parametrize(
    ("method", "tables", "said"),
    [
        ({"group": 3}, {}, r"no whole groups of method.group 3: try method.group 2, or training.tokens_per_step \d+"),
        ({"rewards": [{"kind": "answer", "weight": 0}]}, {}, "`method.rewards`: every weight is 0, nothing would be"),
        ({"answer_tokens": 32}, {}, "leaves no room"),
        ({"template": "ask"}, {}, "has no {prompt}"),
        ({"replay": "update"}, {}, "there is one"),
        ({"clip_high": 0.3}, {}, "does nothing with one step"),
        ({"ratio": "gspo", "normalize": "token"}, {}, "is of token ratios"),
        ({"ratio": "sequence", "supervision": "process"}, {}, "gives every token an advantage"),
        ({"beta": 0.0, "reference_every": 3}, {}, "beta is 0"),
        (
            {"answer_tokens": 26},
            {},
            "longer than the 6 tokens that method.answer_tokens 26 leaves of data.sequence_length 32",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    start: Path, tmp_path: Path, method: dict[str, Any], tables: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        train(practising(start, method, **tables), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_drawn_twice_are_told(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = {"kind": "problems", "problem": "arithmetic", "difficulty": 1, "count": 500, "validation_count": 4}
    recipe = practising(start, data={"corpus": corpus})
    with caplog.at_level(logging.INFO, "finemoe"):
        report = data_excerpts(recipe)["report"]
    assert report["duplicates"] == 500 - report["items"]["train"] > 0
    again = f"problems came up again {report['duplicates']:,} times, as there are only so many: each is read once"
    assert again in caplog.messages
    assert "copies" not in caplog.text, "which sounds like a fault of somebody's data"


def test_a_template_that_nobody_named_is_told_and_what_was_asked_is_kept(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = {"data": {"sequence_length": 64}, "training": {"steps": 1, "tokens_per_step": 8 * 64}}
    recipe = practising(start, {"template": None}, **longer)
    run = train(recipe, out=tmp_path / "run", quiet=True).directory
    (said,) = [one for one in caplog.messages if one.startswith("no chat template in ")]
    assert r"asked as 'User:\n" in said
    assert r"\n\nAssistant:\n'; set method.template = " in said
    samples = [one["samples"][0] for one in read_metrics(run) if one["kind"] == "validation"]
    for one in (*(one for one in lines(run) if one["kind"] == "answer"), *samples):
        assert one["asked"] == f"User:\n{one['prompt']}\n\nAssistant:\n"
    caplog.clear()
    plain = train(practising(start, training={"steps": 1}), out=tmp_path / "plain", quiet=True).directory
    assert not [one for one in caplog.messages if one.startswith("no chat template in ")]
    assert all("asked" not in one for one in lines(plain))


def test_text_of_an_answer_is_without_the_token_that_ended_it(start: Path, tmp_path: Path) -> None:
    """Else whoever looks for answers with a "<" in them finds all that ended."""
    run = train(practising(start, training={"steps": 20, "checkpoint_every": 20}), out=tmp_path / "run", quiet=True)
    end = load_tokenizer(run.directory).end_of_text_id
    ended = [one for one in find_answers(run.directory) if one["finish_reason"] == "stop"]
    whole = [one for one in ended if "completion_ids" in one]
    assert whole
    assert all(one["completion_ids"][-1] == end for one in whole)
    assert all("end_of_text" not in one["completion"] for one in ended)
