"""The multi-token prediction loss against V3 Eq. 24-25, position by position."""

from __future__ import annotations

import pytest
import torch
from test_balancing import balanced_trainer
from test_trainer import LENGTH, SEQUENCES, batch_at, run

from finemoe.training.balancing import BalancingConfig
from finemoe.training.losses.next_token import MTPLossConfig, NextToken
from oracles.models import build, small_config


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_each_depth_predicts_one_token_further(depth: int, isolate: bool) -> None:
    model = build(small_config(mtp_depth=depth, init_std=0.1))
    objective = NextToken(isolate, mtp_depth=depth)
    batch = batch_at(0, 3)
    documents = batch.documents if isolate else None
    ahead = model(batch.tokens, positions=batch.positions, documents=documents, mtp=True).mtp_hidden
    sums, counts = objective.terms(model, batch).sums, objective.counts(batch)
    for k in range(1, depth + 1):
        total = weight = 0.0
        for row in range(3):
            for i in range(LENGTH - k):
                w = batch.weights[row, i + k].item()
                if isolate and batch.documents[row, i] != batch.documents[row, i + k]:
                    w = 0.0
                logprobs = model.logits(ahead[k - 1][row, i]).log_softmax(-1)
                total -= w * logprobs[batch.targets[row, i + k]].item()
                weight += w
        assert sums[f"mtp_{k}"].item() == pytest.approx(total, rel=1e-4)
        assert counts[f"mtp_{k}"] == pytest.approx(weight)


def test_weight_is_shared_by_the_depths_and_falls_late() -> None:
    objective = NextToken(True, MTPLossConfig(weight=0.3, late_weight=0.1, late_from=0.5), mtp_depth=2)
    assert objective.weights(0.49) == {"mtp_1": 0.15, "mtp_2": 0.15}
    assert objective.weights(0.5) == {"mtp_1": 0.05, "mtp_2": 0.05}


@pytest.mark.parametrize("micro", [1, SEQUENCES])
def test_gradient_of_a_step_is_that_of_the_weighted_sum(micro: int) -> None:
    config = small_config(mtp_depth=1, init_std=0.1)
    ours, theirs = build(config), build(config)
    made = balanced_trainer(ours, BalancingConfig(), micro)
    report = run(made, 1)[0]
    batch = batch_at(0, SEQUENCES)
    objective = NextToken(True, mtp_depth=1)
    sums, counts = objective.terms(theirs, batch).sums, objective.counts(batch)
    loss = sums["cross_entropy"] / counts["cross_entropy"] + 0.3 * sums["mtp_1"] / counts["mtp_1"]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    assert report.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    assert report.terms["mtp_1"] == pytest.approx((sums["mtp_1"] / counts["mtp_1"]).item(), rel=1e-5)
    assert report.loss == report.terms["cross_entropy"]


def test_modules_learn_to_look_ahead() -> None:
    model = build(small_config(mtp_depth=1, init_std=0.1))
    made = balanced_trainer(model, BalancingConfig(), steps=80)
    fixed = batch_at(0, SEQUENCES)
    model.train()
    losses = [made.step([fixed]).terms["mtp_1"] for _ in range(80)]
    assert losses[-1] < 0.5 * losses[0]
