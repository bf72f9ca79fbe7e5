"""GRPO: loss and all gradients, on one frozen batch, are those of TRL's trainer (`FINEMOE_TRL`, as in test_trl.py)."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.methods.grpo.batch import RolloutBatch, packed
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.objective import PolicyGradient, read
from finemoe.methods.grpo.rollout import Answer, Drawn, Scored
from finemoe.model.logprobs import token_logprobs
from parity.foreign_models import ours, read_folder, take
from parity.frozen_batch import BATCH
from parity.test_trl import BOUND, MODELS, PEER, Exported, export

ADVANTAGES = (1.3, -0.7, 0.4, -1.1, 0.9, 0.2, -1.6, 0.6)


@dataclass(frozen=True)
class Case:
    """A setting of ours, and the same for TRL."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    cap: float | None = None
    """Of importance weights, which TRL has with vLLM alone."""
    first: bool = False
    """At the first step on a rollout."""

    @property
    def config(self) -> GRPOConfig:
        return GRPOConfig(**{"beta": 0.0, "inner_epochs": 1 if self.first else 2, **self.ours})

    @property
    def question(self) -> dict[str, Any]:
        plain = {"loss_type": "grpo", "beta": 0.0, "use_bias_correction_kl": False}
        return {"arguments": {**plain, **self.theirs}, "cap": self.cap, "first": self.first}


GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04}
CASES = {
    "DeepSeekMath, first step": Case({"beta": 0.04}, {"beta": 0.04}, first=True),
    "DeepSeekMath": Case({"beta": 0.04}, {"beta": 0.04}),
    "DAPO": Case({"normalize": "token", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "Dr. GRPO": Case(
        {"normalize": "constant", "answer_tokens": 16}, {"loss_type": "dr_grpo", "max_completion_length": 16}
    ),
    "GSPO": Case({"ratio": "gspo", "clip": 0.03, "clip_high": 0.04}, GSPO),
    "CISPO": Case({"normalize": "token", "cispo": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "unbiased KL": Case({"beta": 0.1, "unbiased_kl": True}, {"beta": 0.1, "use_bias_correction_kl": True}),
    "importance weights": Case({"importance_cap": 1.1}, cap=1.1),
    "off-policy mask": Case({"off_policy_bound": 0.02}, {"off_policy_mask_threshold": 0.02}),
}


def answers() -> list[dict[str, Any]]:
    found = [(pair["prompt"], pair[side]) for pair in BATCH["pairs"] for side in ("chosen", "rejected")]
    return [
        {"prompt": prompt, "completion": completion, "advantage": advantage}
        for (prompt, completion), advantage in zip(found, ADVANTAGES, strict=True)
    ]


def batch_of(columns: Mapping[str, list[list[float]]], *, first: bool) -> RolloutBatch:
    made, scored = [], []
    for number, one in enumerate(answers()):
        drawn = Drawn(tuple(one["prompt"]), tuple(one["completion"]), tuple(columns["behaviour"][number]), "stop")
        made.append(Answer(drawn, 0, 0, 1.0, (one["advantage"],) * len(one["completion"])))
        old = None if first else torch.tensor(columns["old"][number])
        scored.append(Scored(old, torch.tensor(columns["reference"][number])))
    return packed(made, scored)


def columns_of(policy: Path) -> dict[str, list[list[float]]]:
    """What others say of the answers: as the policy does, and a little beside it."""
    lengths = [len(one["completion"]) for one in answers()]
    nothing = [[0.0] * length for length in lengths]
    batch = batch_of({"behaviour": nothing, "old": nothing, "reference": nothing}, first=True)
    model = ours(policy)
    with torch.no_grad():
        output = read(model, batch, {})
        targets = batch.rows.targets[0, batch.places]
        logprobs, _ = token_logprobs(model, output.hidden[0, batch.places], targets)
    draw = random.Random(3)
    found: dict[str, list[list[float]]] = {}
    for name, scale in (("old", 0.25), ("reference", 0.3), ("behaviour", 0.3)):
        found[name] = [
            [value + scale * draw.gauss(0, 1) for value in part.tolist()] for part in logprobs.split(lengths)
        ]
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    return {model: export(model, tmp_path_factory.mktemp(model)) for model in MODELS}


@pytest.fixture(scope="module")
def columns(exported: dict[str, Exported]) -> dict[str, dict[str, list[list[float]]]]:
    return {model: columns_of(one.policy) for model, one in exported.items()}


@pytest.fixture(scope="module")
def witness(
    exported: dict[str, Exported],
    columns: dict[str, dict[str, list[list[float]]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    if PEER is None:
        pytest.skip("FINEMOE_TRL names no Python that has trl")
    home = tmp_path_factory.mktemp("grpo-witness")
    job = {
        "models": {name: {"policy": str(one.policy), "columns": columns[name]} for name, one in exported.items()},
        "batch": {"answers": answers()},
        "questions": {name: case.question for name, case in CASES.items()},
    }
    (home / "job.json").write_text(json.dumps(job))
    command = [PEER, str(Path(__file__).with_name("trl_grpo_witness.py")), str(home / "job.json"), str(home / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, **offline}, cwd=home)
    assert not done.returncode, done.stderr[-4000:]
    return home / "out"


def our_answer(policy: Path, case: Case, columns: Mapping[str, list[list[float]]]) -> tuple[float, dict[str, Tensor]]:
    """Our loss, and our gradients under the names of the family's files."""
    raw, _ = read_folder(policy)
    model = ours(policy).train()
    objective, batch = PolicyGradient(case.config), batch_of(columns, first=case.first)
    counts, weights = objective.counts(batch), objective.weights(0.0)
    sums = objective.terms(model, batch).sums
    means = [weights.get(name, 1.0) * one / counts[name] for name, one in sums.items() if counts.get(name)]
    loss = torch.stack([one.to(torch.float32) for one in means]).sum()
    loss.backward()
    found = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return loss.item(), take(model, raw["model_type"], found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_policy_gradients_are_trls(
    exported: dict[str, Exported],
    columns: dict[str, dict[str, list[list[float]]]],
    witness: Path,
    model: str,
    name: str,
) -> None:
    loss, gradients = our_answer(exported[model].policy, CASES[name], columns[model])
    theirs = json.loads((witness / "found.json").read_text())["models"][model][name]["loss"]
    expected = read_folder(witness / model / name)[1]
    assert gradients.keys() == expected.keys()
    apart = {}
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        difference = float((gradient - expected[key]).abs().max())
        apart[key] = difference / scale if scale else difference
    worst = max(apart, key=lambda key: apart[key])
    print(f"\n| {name} | {model} | {theirs:.4f} | {abs(loss - theirs):.1e} | {apart[worst]:.1e} | {worst}")
    assert abs(loss - theirs) <= BOUND * max(1.0, abs(theirs))
    assert apart[worst] <= BOUND, worst


@pytest.mark.parametrize("model", MODELS)
def test_the_frozen_answers_decide_something(
    exported: dict[str, Exported], columns: dict[str, dict[str, list[list[float]]]], model: str
) -> None:
    """Some ratios are clipped, some weights capped, some answers left out: else the comparison would say little."""
    found = ours(exported[model].policy)
    for name, figure in (("DAPO", "clip_share"), ("CISPO", "clip_share"), ("off-policy mask", "masked_share")):
        batch = batch_of(columns[model], first=False)
        with torch.no_grad():
            share = PolicyGradient(CASES[name].config).terms(found, batch).sums[figure] / len(batch.places)
        assert 0 < share < 1, name
