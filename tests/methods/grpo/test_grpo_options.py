"""Options of GRPO in whole runs: each does in a run what its key says, and not only in the function that it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch

from finemoe.charts.run.page import run_page
from finemoe.methods.grpo import objective
from finemoe.methods.grpo.batch import RolloutBatch
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.rollout import Drawn
from finemoe.methods.grpo.rollouts import Rollouts
from finemoe.methods.grpo.source import OwnEngine
from finemoe.methods.grpo.surrogate import Tokens, surrogate
from finemoe.runs.report import run_results
from finemoe.runs.run import train
from methods.grpo.tiny_policy import LENGTH, base, practising
from runs.tiny_runs import steps


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("options"))


def run(start: Path, out: Path, method: dict[str, Any], **tables: Any) -> Path:
    """Of four steps, with every rollout whole."""
    own = {"training": {"steps": 4, "evaluate_every": 4}, **tables}
    return train(practising(start, {"keep_rollouts": 1, **method}, **own), out=out, quiet=True).directory


def groups(run: Path) -> Iterator[list[dict[str, Any]]]:
    """Answers of each group, in the order in which they were written."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for line in (run / "rollouts.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["kind"] == "answer":
            found.setdefault((one["rollout"], one["group"]), []).append(one)
    yield from found.values()


def own(folder: Path, body: str) -> dict[str, Any]:
    path = folder / "own.py"
    path.write_text(f"def score(prompt, completion, record):\n    {body}\n")
    return {"kind": "function", "path": f"{path}:score"}


def test_a_renewed_reference_is_the_policy_again(start: Path, tmp_path: Path) -> None:
    """Iterative GRPO: with each rollout the divergence begins at 0."""
    kept = [one["terms"]["kl"] for one in steps(run(start, tmp_path / "kept", {"inner_epochs": 2}))]
    renewed = [
        one["terms"]["kl"] for one in steps(run(start, tmp_path / "renewed", {"inner_epochs": 2, "reference_every": 1}))
    ]
    assert kept[0] == pytest.approx(0, abs=1e-6)
    assert kept[2] > 1e-4
    assert [renewed[0], renewed[2]] == pytest.approx([0, 0], abs=1e-6)
    assert renewed[3] > 1e-5


HALF = "return sum(map(ord, completion)) % 7 if sum(map(ord, prompt)) % 2 else 1.0"
"""Groups of every second prompt are alike."""


def test_other_prompts_are_asked_for_dead_groups_and_what_was_discarded_is_told(start: Path, tmp_path: Path) -> None:
    bound, wanted = 2, 2
    done = run(start, tmp_path / "run", {"dynamic_sampling": bound, "rewards": [own(tmp_path, HALF)]})
    asked = [one["figures"]["prompts_asked"] for one in steps(done)]
    assert max(asked) > wanted
    assert all(wanted <= one <= wanted * (1 + bound) for one in asked)
    found = list(groups(done))
    assert len(found) == sum(asked)
    for number, count in enumerate(asked):
        of = [one for one in found if one[0]["rollout"] == number]
        assert [one[0]["group"] for one in of] == list(range(int(count)))
        assert [one[0].get("discarded", False) for one in of] == [place >= wanted for place in range(int(count))]
        for group in of[wanted:]:
            assert not any(one["advantage"] for one in group)
            assert all("routes" not in one and one["completion"] is not None for one in group)
    dead = [one["figures"]["dead_groups"] for one in steps(done)]
    plain = steps(run(start, tmp_path / "plain", {"rewards": [own(tmp_path, HALF)]}))
    assert sum(dead) < sum(one["figures"]["dead_groups"] for one in plain)
    assert {one["figures"]["prompts_asked"] for one in plain} == {wanted}


def test_prompts_come_in_the_order_that_was_given(start: Path, tmp_path: Path) -> None:
    given = [one[0]["item"] for one in groups(run(start, tmp_path / "given", {"order": "given"}))]
    assert given == list(range(8))
    shuffled = [one[0]["item"] for one in groups(run(start, tmp_path / "shuffled", {}))]
    assert sorted(set(shuffled)) == sorted(shuffled) != shuffled


def test_steps_of_an_answer_have_advantages_of_their_own(start: Path, tmp_path: Path) -> None:
    steps_of = "return {'value': 1.0, 'steps': [(1, ord(completion[0]) % 3), (3, ord(completion[-1]) % 5)]}"
    method = {"rewards": [own(tmp_path, steps_of)], "supervision": "process"}
    found = [one for group in groups(run(start, tmp_path / "process", method)) for one in group]
    assert any(len(set(one["advantages"])) > 1 for one in found)
    method["supervision"] = "outcome"
    found = [one for group in groups(run(start, tmp_path / "outcome", method)) for one in group]
    assert all(len(set(one["advantages"])) == 1 for one in found)


@pytest.mark.parametrize("scale", ["std", "none", "raw"])
def test_advantages_are_scaled_as_the_key_says(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str
) -> None:
    """What is learnt is what rollouts.jsonl says, and that follows from the values by hand."""
    learnt = batches(monkeypatch)
    found = list(groups(run(start, tmp_path / "run", {"scale": scale})))
    assert any(len({one["value"] for one in group}) > 1 for group in found)
    for group in found:
        values = [one["value"] for one in group]
        mean, spread = (0.0, 1.0) if scale == "raw" else (fmean(values), pstdev(values) if scale == "std" else 1.0)
        expected = [(one - mean) / (spread or 1.0) for one in values]
        assert [one["advantage"] for one in group] == pytest.approx(expected, abs=1e-5)
        assert all(set(one["advantages"]) == {one["advantage"]} for one in group)
    told = [number for group in found for one in group for number in one["advantages"]]
    last = len(learnt[-1].advantages)
    assert learnt[-1].advantages.tolist() == pytest.approx(told[-last:], abs=1e-5)


def batches(monkeypatch: pytest.MonkeyPatch) -> list[RolloutBatch]:
    """Every batch that is learnt, as it comes."""
    found: list[RolloutBatch] = []
    real = Rollouts.batch

    def noted(self: Rollouts, position: int, num: int) -> RolloutBatch:
        found.append(real(self, position, num))
        return found[-1]

    monkeypatch.setattr(Rollouts, "batch", noted)
    return found


@pytest.mark.parametrize("replay", ["off", "update", "rollout"])
def test_experts_are_those_of_who_wrote_or_of_the_policy_before_the_first_step(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: str
) -> None:
    """An engine that says of every token the experts beside those that it took tells whose were taken."""
    experts, real = 8, OwnEngine.__call__

    def beside(self: OwnEngine, *arguments: Any) -> list[list[Drawn]]:
        return [
            [replace(one, routes={layer: (ids + 1) % experts for layer, ids in one.routes.items()}) for one in group]
            for group in real(self, *arguments)
        ]

    monkeypatch.setattr(OwnEngine, "__call__", beside)
    learnt = batches(monkeypatch)
    run(start, tmp_path / "run", {"replay": replay, "inner_epochs": 2}, training={"steps": 2, "evaluate_every": 2})
    first, again = learnt[-2:]
    assert first.routes
    if replay == "off":
        assert not first.replay
        return
    assert first.replay.keys() == again.replay.keys() == first.routes.keys()
    for layer, drawn in first.routes.items():
        moved = 1 if replay == "update" else 0
        assert torch.equal((first.replay[layer] + moved) % experts, drawn)
        assert torch.equal(first.replay[layer], again.replay[layer]), "for all steps on the rollout"


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    "method",
    [
        {"steps_per_rollout": 2},
        {"inner_epochs": 2, "replay": "update"},
        {"steps_per_rollout": 2, "inner_epochs": 2},
    ],
    ids=str,
)
def test_at_the_first_step_of_several_the_ratio_is_one(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], pieces: int
) -> None:
    """Complaint 11 of post-training: to the last bit, in however many micro-batches.

    Of answers that wait for a later step it is not, by right.
    """
    apart: list[float] = []

    def noted(config: GRPOConfig, logprobs: torch.Tensor, tokens: Tokens) -> Any:
        apart.append((logprobs - tokens.old).abs().max().item())
        return surrogate(config, logprobs, tokens)

    monkeypatch.setattr(objective, "surrogate", noted)
    cut = {"steps": 4, "evaluate_every": 4, "micro_batch_tokens": 8 * LENGTH // pieces}
    run(start, tmp_path / "run", method, training=cut)
    updates = GRPOConfig(**method).updates
    of_steps = [apart[place : place + pieces] for place in range(len(apart) - 4 * pieces, len(apart), pieces)]
    for number, found in enumerate(of_steps):
        if number % updates:
            assert min(found) > 1e-4
        else:
            assert found == [0.0] * pieces


def test_without_a_reference_no_divergence_is_told(start: Path, tmp_path: Path) -> None:
    """0 would say that the model had not moved."""
    done = run(start, tmp_path / "run", {"beta": 0.0})
    assert all("kl" not in one["terms"] and "off_policy_kl" in one["terms"] for one in steps(done))
    page = run_page(run_results(done))
    assert "divergence from the reference" not in page
    assert "off-policy KL" in page
