"""Figures of GRPO's runs, counted again by hand from what the runs wrote, and warnings that reach the run's record."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest

from finemoe.checkpoint.open import load_tokenizer
from finemoe.generation.config import SamplingConfig
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.runs.run import train
from finemoe.training.directory import read_metrics
from methods.grpo.tiny_policy import base, practising
from methods.tiny_talks import weights
from runs.tiny_runs import steps


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("figures"))


RULES = """
def letters(prompt, completion, record):
    if sum(map(ord, prompt)) % 3:
        return 1.0
    return sum(letter in "aeiou" for letter in completion) / 4


def picky(prompt, completion, record):
    number = sum(map(ord, completion)) % 3
    assert number != 2, "as it was told"
    return None if number == 1 else 0.5
"""


def rules(folder: Path) -> list[dict[str, Any]]:
    """One by which two of three prompts teach nothing; and one that is watched, and reads and fails at a third each."""
    path = folder / "rules.py"
    path.write_text(RULES)
    return [
        {"kind": "function", "name": "letters", "path": f"{path}:letters"},
        {"kind": "function", "name": "picky", "path": f"{path}:picky", "weight": 0.0},
    ]


def test_figures_are_those_of_the_answers(start: Path, tmp_path: Path) -> None:
    method = {"rewards": rules(tmp_path), "dynamic_sampling": 1, "answer_tokens": 24}
    training = {"steps": 6, "tokens_per_step": 8 * 64, "evaluate_every": 6}
    recipe = practising(start, method, training=training, data={"sequence_length": 64})
    run = train(recipe, out=tmp_path / "run", quiet=True).directory
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    told = [one["figures"] for one in steps(run)]
    related = 0
    for number, figures in enumerate(told):
        everything = [one for one in lines if one["kind"] == "answer" and one["rollout"] == number]
        answers = [one for one in everything if not one.get("discarded")]
        groups = [[one["value"] for one in answers if one["group"] == group] for group in range(2)]
        picky = [one["rewards"]["picky"] for one in answers]
        known = [one["value"] for one in picky if one["verdict"] != "error"]
        expected = {
            "reward": fmean(one["value"] for one in answers),
            "reward_letters": fmean(one["value"] for one in answers),
            "reward_picky": fmean(known),
            "length": fmean(one["length"] for one in answers),
            "cut_share": fmean(one["finish_reason"] == "length" for one in answers),
            "failed_share": 0.0,
            "dead_groups": fmean(len(set(values)) == 1 for values in groups),
            "unreadable_letters": 0.0,
            "unreadable_picky": fmean(one["verdict"] == "unreadable" for one in picky),
            "prompts_asked": len(everything) / 4,
        }
        lengths = [[one["length"] for one in answers if one["group"] == group] for group in range(2)]
        both = [pair for pair in zip(lengths, groups, strict=True) if all(len(set(column)) > 1 for column in pair)]
        if both:
            expected["length_correlation"] = fmean(correlation(*pair) for pair in both)
        assert ("length_correlation" in figures) == bool(both)
        related += bool(both)
        assert {name: figures[name] for name in expected} == pytest.approx(expected)
        (line,) = [one for one in lines if one["kind"] == "rollout" and one["rollout"] == number]
        assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert related, "lengths and rewards differ now and then"
    for name in ("dead_groups", "unreadable_picky", "prompts_asked", "cut_share"):
        assert len({one[name] for one in told}) > 1, f"{name} says something here"


def test_held_out_prompts_are_answered_drawn_and_greedily(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the key says, and each figure is of the answers that its name says."""
    calls: list[tuple[SamplingConfig, list[Asked], list[list[Drawn]]]] = []
    real = OwnEngine.__call__

    def noted(self: OwnEngine, asked: list[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        found = real(self, asked, sampling)
        calls.append((sampling, asked, found))
        return found

    monkeypatch.setattr(OwnEngine, "__call__", noted)
    method = {"validation_prompts": 3, "temperature": 0.7}
    run = train(practising(start, method, training={"steps": 2}), out=tmp_path / "run", quiet=True).directory
    (drawn, greedily) = calls[-2:]
    assert [one[0].temperature for one in (drawn, greedily)] == [1.0, 0.0]
    assert [len(one[1]) for one in (drawn, greedily)] == [3, 3]
    tokenizer = load_tokenizer(run)

    def worth(answers: list[list[Drawn]]) -> float:
        texts = [tokenizer.decode(one.completion) for (one,) in answers]
        return fmean(sum(letter in "aeiou" for letter in text) / 4 for text in texts)

    last = [one for one in read_metrics(run) if one["kind"] == "validation"][-1]
    assert last["validation_reward"] == last["validation_reward_function"] == pytest.approx(worth(drawn[2]))
    assert last["validation_greedy_reward_function"] == pytest.approx(worth(greedily[2]))
    assert drawn[2] != greedily[2]
    (sample,) = last["samples"]
    assert sample["answer"] == tokenizer.decode(drawn[2][0][0].completion)
    assert sample["references"] == [str(sum(map(int, sample["prompt"].strip("=\n"))) % 5)], "what would be right"
    assert sample["verdicts"] == {"function": "right" if sample["value"] > 0 else "wrong"}


def test_selection_biases_move_where_they_are_told_to(start: Path, tmp_path: Path) -> None:
    rate, before = 0.01, weights(start)
    for name, tables in (("still", {}), ("moved", {"balancing": {"rate": rate}})):
        run = train(practising(start, training={"steps": 2}, **tables), out=tmp_path / name, quiet=True).directory
        after = weights(run)
        biases = [one for one in after if one.endswith("selection_bias") and not one.startswith("mtp.")]
        assert biases
        apart = max((after[one] - before[one]).abs().max().item() for one in biases)
        assert apart == pytest.approx(2 * rate if name == "moved" else 0.0, rel=1e-4)


def warnings(run: Path) -> list[tuple[int, str]]:
    return [(one["step"], one["message"]) for one in read_metrics(run) if one["kind"] == "warning"]


def test_groups_that_teach_nothing_are_told_in_the_record(start: Path, tmp_path: Path) -> None:
    """Complaint 14 of post-training, from the answers to metrics.jsonl."""
    path = tmp_path / "alike.py"
    path.write_text("def score(prompt, completion, record):\n    return 0.5\n")
    recipe = practising(start, {"rewards": [{"kind": "function", "path": f"{path}:score"}]}, training={"steps": 7})
    run = train(recipe, out=tmp_path / "run", quiet=True).directory
    assert {one["figures"]["dead_groups"] for one in steps(run)} == {1.0}
    ((step, message),) = [one for one in warnings(run) if "teach nothing" in one[1]]
    assert step == 5
    assert message.startswith("100% of the groups teach nothing, as all of their answers are worth the same")
    sound = train(practising(start, training={"steps": 7}), out=tmp_path / "sound", quiet=True).directory
    assert not [one for one in warnings(sound) if "teach nothing" in one[1]]


def test_steps_that_go_far_from_who_wrote_are_told_once(start: Path, tmp_path: Path) -> None:
    """Complaints 11 and 12 of post-training: four steps on each rollout at a high rate, in metrics.jsonl."""
    method = {"inner_epochs": 4, "answer_tokens": 6}
    training = {"steps": 48, "checkpoint_every": 48, "evaluate_every": 48}
    high = practising(start, method, training=training, optimizer={"learning_rate": 0.03})
    run = train(high, out=tmp_path / "high", quiet=True).directory
    apart = [step for step, message in warnings(run) if "nats from who wrote the answers" in message]
    assert apart == [20], "after the last step of the fifth rollout"
    for one in steps(run):
        terms = one["terms"]
        assert terms["off_policy_kl"] < 1e-8 if one["step"] % 4 == 1 else terms["off_policy_kl"] > 1e-3
    low = practising(start, method, training=training, optimizer={"learning_rate": 1e-4})
    assert not [one for one in warnings(train(low, out=tmp_path / "low", quiet=True).directory) if "nats" in one[1]]
