"""Balance losses against DeepSeekMoE equations 12 to 17, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finemoe.model.moe.balance import (
    BALANCE_TERMS,
    BalanceConfig,
    balance_terms,
    load_and_importance,
    max_violation,
)
from finemoe.model.moe.decision import RoutingDecision
from oracles import balance as oracle

SEQUENCES, LENGTH, EXPERTS, K, DEVICES = 3, 5, 6, 2, 3


def drawn(expert_ids: Tensor | None = None) -> RoutingDecision:
    logits = torch.randn(SEQUENCES * LENGTH, EXPERTS, dtype=torch.float64, requires_grad=True)
    scores = logits.softmax(-1)
    ids = scores.topk(K).indices if expert_ids is None else expert_ids
    return RoutingDecision(ids, scores.gather(1, ids), scores, logits)


def summed(name: str, decision: RoutingDecision) -> Tensor:
    """The oracle of each sequence alone, added up."""
    total = torch.zeros((), dtype=torch.float64)
    for s in range(SEQUENCES):
        part = slice(s * LENGTH, (s + 1) * LENGTH)
        ids, scores = decision.expert_ids[part], decision.scores[part]
        total = (
            total
            + {
                "expert": lambda: oracle.expert_loss(ids, scores),  # noqa: B023 - called at once
                "device": lambda: oracle.device_loss(ids, scores, DEVICES),  # noqa: B023
                "z": lambda: oracle.z_loss(decision.logits[part]),  # noqa: B023
            }[name]()
        )
    return total


@pytest.mark.parametrize("name", BALANCE_TERMS)
def test_loss_and_gradient_are_the_formula_of_each_sequence(name: str) -> None:
    decision = drawn()
    loss, expected = BALANCE_TERMS[name](decision, SEQUENCES, DEVICES), summed(name, decision)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    (found,) = torch.autograd.grad(loss, decision.logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, decision.logits)[0], rtol=1e-8, atol=1e-12)


def test_expert_loss_is_one_per_sequence_at_perfect_balance() -> None:
    ids = torch.arange(SEQUENCES * LENGTH * K).view(-1, K) % EXPERTS
    scores = torch.full((SEQUENCES * LENGTH, EXPERTS), 1 / EXPERTS)
    decision = RoutingDecision(ids, scores[:, :K], scores, scores.log())
    for name in ("expert", "device"):
        assert BALANCE_TERMS[name](decision, SEQUENCES, DEVICES).item() == pytest.approx(SEQUENCES)


def test_expert_loss_is_the_number_of_experts_at_collapse() -> None:
    scores = torch.zeros(LENGTH, EXPERTS)
    scores[:, 0] = 1
    decision = RoutingDecision(torch.zeros(LENGTH, 1, dtype=torch.int64), scores[:, :1], scores, None)
    assert BALANCE_TERMS["expert"](decision, 1, 1).item() == pytest.approx(EXPERTS)


def test_device_loss_sees_devices_only() -> None:
    # All load on experts 0, 2 and 4: the experts are uneven, the devices (0 1), (2 3), (4 5) are even.
    ids = torch.tensor([[0], [2], [4]])
    scores = torch.nn.functional.one_hot(ids[:, 0], EXPERTS).float()
    decision = RoutingDecision(ids, torch.ones(3, 1), scores, None)
    assert BALANCE_TERMS["device"](decision, 1, 3).item() == pytest.approx(1)
    assert BALANCE_TERMS["expert"](decision, 1, 3).item() == pytest.approx(2)


def test_load_counts_what_was_chosen_not_what_scored_best() -> None:
    worst = torch.randn(SEQUENCES * LENGTH, EXPERTS).topk(K, largest=False).indices
    f, importance = load_and_importance(drawn(worst), SEQUENCES)
    counts = worst.view(SEQUENCES, -1, 1).eq(torch.arange(EXPERTS)).sum(1)
    torch.testing.assert_close(f, counts.double() * EXPERTS / (K * LENGTH))
    torch.testing.assert_close(importance.sum(1), torch.ones(SEQUENCES, dtype=torch.float64))


def test_terms_that_are_off_are_absent_and_coefficients_multiply() -> None:
    decision = drawn()
    terms = balance_terms(BalanceConfig(expert=0.01, z=0.5), decision, SEQUENCES)
    assert set(terms) == {"expert", "z"}
    for name, coefficient in (("expert", 0.01), ("z", 0.5)):
        expected = coefficient * BALANCE_TERMS[name](decision, SEQUENCES, 1)
        torch.testing.assert_close(terms[name], expected)


def test_cutting_a_batch_changes_no_sum() -> None:
    decision = drawn()
    halves = [slice(0, LENGTH), slice(LENGTH, None)]
    for name, term in BALANCE_TERMS.items():
        parts = [
            RoutingDecision(*(getattr(decision, f)[half] for f in ("expert_ids", "gate_weights", "scores", "logits")))
            for half in halves
        ]
        total = term(parts[0], 1, DEVICES) + term(parts[1], SEQUENCES - 1, DEVICES)
        torch.testing.assert_close(total, term(decision, SEQUENCES, DEVICES), msg=name)


@pytest.mark.parametrize(("load", "expected"), [([4, 4, 4], 0.0), ([12, 0, 0], 2.0), ([3, 6, 3], 0.5), ([0, 0], 0.0)])
def test_max_violation(load: list[int], expected: float) -> None:
    assert max_violation(torch.tensor(load)) == pytest.approx(expected)
