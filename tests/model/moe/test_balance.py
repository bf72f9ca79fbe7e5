"""Balance losses against DeepSeekMoE equations 12 to 17, V2 29 to 31 and V3 17 to 20, sequence by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.model.moe.balance import (
    BALANCE_TERMS,
    BalanceConfig,
    Layout,
    balance_terms,
    load_and_importance,
    max_violation,
)
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.sequences import Sequences
from oracles import balance as oracle
from oracles.models import VOCAB, moe_layer, moe_table

SEQUENCES, LENGTH, EXPERTS, K, DEVICES = 3, 5, 6, 2, 3
LAYOUT = Layout(DEVICES, devices_per_token=2)
ONE_DEVICE = Layout(1, devices_per_token=1)


def drawn(expert_ids: Tensor | None = None, sigmoid: bool = False) -> RoutingDecision:
    logits = torch.randn(SEQUENCES * LENGTH, EXPERTS, dtype=torch.float64, requires_grad=True)
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ids = scores.topk(K).indices if expert_ids is None else expert_ids
    return RoutingDecision(ids, scores.gather(1, ids), scores, logits)


def alone(name: str, ids: Tensor, scores: Tensor, logits: Tensor, layout: Layout) -> Tensor:
    """The oracle of one sequence."""
    match name:
        case "expert":
            return oracle.expert_loss(ids, scores)
        case "device":
            return oracle.device_loss(ids, scores, layout.num_devices)
        case "communication":
            return oracle.communication_loss(ids, scores, layout.num_devices, layout.devices_per_token)
        case "sequence":
            return oracle.sequence_loss(scores, K)
        case "z":
            return oracle.z_loss(logits)
    raise AssertionError(f"balance term {name} has no oracle")


def summed(name: str, decision: RoutingDecision, layout: Layout = LAYOUT) -> Tensor:
    """The oracle of each sequence alone, added up."""
    parts = [slice(s * LENGTH, (s + 1) * LENGTH) for s in range(SEQUENCES)]
    fields = (decision.expert_ids, decision.scores, decision.logits)
    return torch.stack([alone(name, *(field[part] for field in fields), layout) for part in parts]).sum()


@pytest.mark.parametrize("layout", [LAYOUT, ONE_DEVICE, Layout(6, 1)], ids=["3 devices", "1 device", "6 devices"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("name", BALANCE_TERMS)
def test_loss_and_gradient_are_the_formula_of_each_sequence(name: str, sigmoid: bool, layout: Layout) -> None:
    # Choices that are not the best scores, as under a bias, a group limit or a replay.
    decision = drawn(torch.randn(SEQUENCES * LENGTH, EXPERTS).topk(K).indices, sigmoid)
    loss, expected = BALANCE_TERMS[name](decision, Sequences(SEQUENCES), layout), summed(name, decision, layout)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    (found,) = torch.autograd.grad(loss, decision.logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, decision.logits)[0], rtol=1e-8, atol=1e-12)


def test_expert_loss_is_one_per_sequence_at_perfect_balance() -> None:
    ids = torch.arange(SEQUENCES * LENGTH * K).view(-1, K) % EXPERTS
    scores = torch.full((SEQUENCES * LENGTH, EXPERTS), 1 / EXPERTS)
    decision = RoutingDecision(ids, scores[:, :K], scores, scores.log())
    for name in ("expert", "device"):
        assert BALANCE_TERMS[name](decision, Sequences(SEQUENCES), LAYOUT).item() == pytest.approx(SEQUENCES)


def test_expert_loss_is_the_number_of_experts_at_collapse() -> None:
    scores = torch.zeros(LENGTH, EXPERTS)
    scores[:, 0] = 1
    decision = RoutingDecision(torch.zeros(LENGTH, 1, dtype=torch.int64), scores[:, :1], scores, None)
    assert BALANCE_TERMS["expert"](decision, Sequences(1), ONE_DEVICE).item() == pytest.approx(EXPERTS)


def test_device_loss_sees_devices_only() -> None:
    # All load on experts 0, 2 and 4: the experts are uneven, the devices (0 1), (2 3), (4 5) are even.
    ids = torch.tensor([[0], [2], [4]])
    scores = torch.nn.functional.one_hot(ids[:, 0], EXPERTS).float()
    decision = RoutingDecision(ids, torch.ones(3, 1), scores, None)
    assert BALANCE_TERMS["device"](decision, Sequences(1), LAYOUT).item() == pytest.approx(1)
    assert BALANCE_TERMS["expert"](decision, Sequences(1), LAYOUT).item() == pytest.approx(2)


def one_choice_each(ids: list[list[int]]) -> RoutingDecision:
    """Scores shared evenly by the chosen."""
    chosen = torch.tensor(ids)
    scores = torch.zeros(len(ids), EXPERTS).scatter_(1, chosen, 1 / chosen.shape[1])
    return RoutingDecision(chosen, scores.gather(1, chosen), scores, scores.log())


def test_communication_loss_is_one_where_every_token_reaches_m_devices_evenly() -> None:
    # Devices (0 1) (2 3) (4 5), two a token: the three pairs of devices once each.
    even = one_choice_each([[0, 2], [3, 4], [5, 1]])
    assert BALANCE_TERMS["communication"](even, Sequences(1), LAYOUT).item() == pytest.approx(1)


def test_communication_loss_counts_a_token_once_on_a_device() -> None:
    # Both experts of token 0 on device 0: sent once there. The device loss sees two choices.
    decision = one_choice_each([[0, 1], [2, 4], [3, 5]])
    found = BALANCE_TERMS["communication"](decision, Sequences(1), LAYOUT)
    sent = torch.tensor([1.0, 2.0, 2.0]) * 3 / (2 * 3)
    assert found.item() == pytest.approx((sent * torch.tensor([1.0, 1.0, 1.0]) / 3).sum().item())
    assert found.item() < BALANCE_TERMS["device"](decision, Sequences(1), LAYOUT).item()


def test_sequence_loss_looks_through_the_bias() -> None:
    # Selection is even thanks to some bias; the scores alone would all choose experts 0 and 1.
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1, 0.1, 0.1]]).repeat(3, 1)
    decision = RoutingDecision(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.ones(3, 2), scores, scores.logit())
    expected = EXPERTS / K * (0.9 + 0.8) / 2.1
    assert BALANCE_TERMS["sequence"](decision, Sequences(1), LAYOUT).item() == pytest.approx(expected)


def test_sequence_loss_is_one_per_sequence_at_even_scores() -> None:
    scores = torch.full((SEQUENCES * LENGTH, EXPERTS), 0.37)
    decision = RoutingDecision(scores.topk(K).indices, scores[:, :K], scores, scores.logit())
    assert BALANCE_TERMS["sequence"](decision, Sequences(SEQUENCES), LAYOUT).item() == pytest.approx(SEQUENCES)


LAYOUTS: dict[str, tuple[dict[str, Any], int, Layout]] = {
    "the router's groups are the devices": (
        {"kind": "group_limited", "num_groups": 4, "groups_per_token": 2},
        3,
        Layout(4, 2),
    ),
    "fewer experts than groups a token": (
        {"kind": "group_limited", "num_groups": 4, "groups_per_token": 3},
        2,
        Layout(4, 2),
    ),
    "groups apart from devices": ({"kind": "group_limited", "num_groups": 2, "groups_per_token": 1}, 3, Layout(4, 3)),
    "no groups": ({"kind": "softmax_topk"}, 3, Layout(4, 3)),
    "more experts than devices": ({"kind": "softmax_topk"}, 6, Layout(4, 4)),
}


@pytest.mark.parametrize(("router", "k", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_m_is_the_most_devices_that_a_token_can_reach(router: dict[str, Any], k: int, expected: Layout) -> None:
    table = moe_table(router=router, num_routed_experts=8, experts_per_token=k, balance={"num_devices": 4})
    config = MoEConfig.model_validate(table)
    assert config.layout == expected


def test_layer_hands_its_layout_to_the_losses() -> None:
    router = {"kind": "group_limited", "num_groups": 3, "groups_per_token": 2}
    coefficients = {"expert": 0.1, "device": 0.2, "communication": 0.3, "sequence": 0.4, "z": 0.5}
    layer = moe_layer(moe_table(router=router, balance={**coefficients, "num_devices": DEVICES}))
    hidden, tokens = torch.randn(SEQUENCES, LENGTH, 16), torch.randint(VOCAB, (SEQUENCES, LENGTH))
    _, record = layer(hidden, tokens, constraint=None, record=True)
    assert set(record.balance) == set(BALANCE_TERMS)
    for name, coefficient in coefficients.items():
        torch.testing.assert_close(record.balance[name], (coefficient * summed(name, record.decision)).float())


@pytest.mark.parametrize("term", ["expert", "device", "communication"])
def test_losses_of_scores_that_sum_to_one_are_refused_for_sigmoid_scores(term: str) -> None:
    table = moe_table("sigmoid_biased", balance={term: 0.1})
    with pytest.raises(ConfigError, match=rf"balance\.{term} needs scores that sum to 1.*use balance\.sequence"):
        parse(MoEConfig, table, "here")


@pytest.mark.parametrize("term", BALANCE_TERMS)
def test_every_loss_is_refused_for_a_router_that_learns_nothing(term: str) -> None:
    with pytest.raises(ConfigError, match="balance losses must be 0"):
        parse(MoEConfig, moe_table("hash_layer", balance={term: 0.1}), "here")


def test_load_counts_what_was_chosen_not_what_scored_best() -> None:
    worst = torch.randn(SEQUENCES * LENGTH, EXPERTS).topk(K, largest=False).indices
    f, importance = load_and_importance(drawn(worst), Sequences(SEQUENCES))
    counts = worst.view(SEQUENCES, -1, 1).eq(torch.arange(EXPERTS)).sum(1)
    torch.testing.assert_close(f, counts.double() * EXPERTS / (K * LENGTH))
    torch.testing.assert_close(importance.sum(1), torch.ones(SEQUENCES, dtype=torch.float64))


def test_terms_that_are_off_are_absent_and_coefficients_multiply() -> None:
    decision = drawn()
    terms = balance_terms(BalanceConfig(expert=0.01, z=0.5), decision, Sequences(SEQUENCES), LAYOUT)
    assert set(terms) == {"expert", "z"}
    for name, coefficient in (("expert", 0.01), ("z", 0.5)):
        expected = coefficient * BALANCE_TERMS[name](decision, Sequences(SEQUENCES), LAYOUT)
        torch.testing.assert_close(terms[name], expected)


def test_cutting_a_batch_changes_no_sum() -> None:
    decision = drawn()
    halves = [slice(0, LENGTH), slice(LENGTH, None)]
    for name, term in BALANCE_TERMS.items():
        parts = [
            RoutingDecision(*(getattr(decision, f)[half] for f in ("expert_ids", "gate_weights", "scores", "logits")))
            for half in halves
        ]
        total = term(parts[0], Sequences(1), LAYOUT) + term(parts[1], Sequences(SEQUENCES - 1), LAYOUT)
        torch.testing.assert_close(total, term(decision, Sequences(SEQUENCES), LAYOUT), msg=name)


@pytest.mark.parametrize("lengths", [(4, 11), (1, 7, 7), (15,), (2, 2, 1, 10)])
@pytest.mark.parametrize("name", BALANCE_TERMS)
def test_sequences_of_other_lengths_are_the_formula_of_each_too(name: str, lengths: tuple[int, ...]) -> None:
    decision = drawn(torch.randn(SEQUENCES * LENGTH, EXPERTS).topk(K).indices)
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    fields = (decision.expert_ids, decision.scores, decision.logits)
    each = zip(*(field.split(lengths) for field in fields), strict=True)
    expected = torch.stack([alone(name, *parts, LAYOUT) for parts in each]).sum()
    loss = BALANCE_TERMS[name](decision, Sequences(len(lengths), of), LAYOUT)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    (found,) = torch.autograd.grad(loss, decision.logits, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, decision.logits)[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("load", "expected"), [([4, 4, 4], 0.0), ([12, 0, 0], 2.0), ([3, 6, 3], 0.5), ([0, 0], 0.0)])
def test_max_violation(load: list[int], expected: float) -> None:
    assert max_violation(torch.tensor(load)) == pytest.approx(expected)
