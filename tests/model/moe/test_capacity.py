"""Capacity and its exemptions against loops over assignments (Switch 2.2, GShard 3.2, DeepSeek-V2 2.2.4)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.moe.capacity import exempt_sequences, kept_assignments, kept_on_devices
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision
from oracles import moe as oracle
from oracles.models import VOCAB, moe_layer, moe_table

SHAPES = [(1, 1, 2, 1), (12, 1, 4, 2), (12, 3, 6, 3), (30, 2, 8, 4), (30, 4, 8, 8), (9, 2, 4, 1)]
FACTORS = [0.01, 0.5, 1.0, 1.25, 100.0]


def skewed(tokens: int, k: int, experts: int) -> Tensor:
    """Choices that crowd the later experts."""
    return (torch.rand(tokens, experts) + torch.arange(experts) / experts).topk(k, dim=-1).indices


def decided(expert_ids: Tensor, experts: int) -> RoutingDecision:
    return RoutingDecision(expert_ids, torch.rand(expert_ids.shape), torch.zeros(len(expert_ids), experts), None)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("tokens", "k", "experts", "devices"), SHAPES)
def test_a_device_over_its_budget_drops_its_lowest_gates(
    tokens: int, k: int, experts: int, devices: int, factor: float, share: float
) -> None:
    decision, exempt = decided(skewed(tokens, k, experts), experts), torch.rand(tokens) < share
    found = kept_on_devices(decision, experts, devices, factor, exempt)
    ids, gates = decision.expert_ids, decision.gate_weights
    assert torch.equal(found, oracle.kept_on_devices(ids, gates, experts, devices, factor, exempt))
    assert found[exempt].all()
    budget = math.ceil(tokens * k / devices * factor)
    for device in range(devices):
        here = ids // (experts // devices) == device
        kept, forced = int((found & here).sum()), int((here & exempt[:, None]).sum())
        assert kept == min(int(here.sum()), max(budget, forced))
        droppable = here & ~exempt[:, None]
        if (droppable & ~found).any() and (droppable & found).any():
            assert gates[droppable & ~found].max() <= gates[droppable & found].min()


def test_an_even_load_loses_nothing_at_a_factor_of_one() -> None:
    ids = torch.arange(24).view(12, 2) % 8
    decision = decided(ids, 8)
    assert kept_on_devices(decision, 8, 4, 1.0, torch.zeros(12, dtype=torch.bool)).all()
    assert kept_assignments(ids, 8, 1.0).all()


def test_gates_decide_across_the_experts_of_a_device() -> None:
    # Device 0 holds experts 0 and 1, four assignments, a budget of two: the two best gates, whoever's they are.
    ids = torch.tensor([[0], [0], [1], [1]])
    decision = RoutingDecision(ids, torch.tensor([[0.9], [0.8], [0.3], [0.2]]), torch.zeros(4, 4), None)
    none = torch.zeros(4, dtype=torch.bool)
    assert kept_on_devices(decision, 4, 2, 1.0, none).flatten().tolist() == [True, True, False, False]
    last = torch.tensor([False, False, False, True])
    assert kept_on_devices(decision, 4, 2, 1.0, last).flatten().tolist() == [True, False, False, True]
    assert kept_on_devices(decision, 4, 2, 1.0, ~none).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("tokens", "k", "experts", "devices"), SHAPES)
def test_an_expert_serves_exempt_tokens_first(
    tokens: int, k: int, experts: int, devices: int, factor: float, share: float
) -> None:
    expert_ids, exempt = skewed(tokens, k, experts), torch.rand(tokens) < share
    found = kept_assignments(expert_ids, experts, factor, exempt)
    assert torch.equal(found, oracle.kept_with_exempt(expert_ids, experts, factor, exempt))
    assert found[exempt].all()
    if not exempt.any():
        assert torch.equal(found, kept_assignments(expert_ids, experts, factor))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("text", ["uniform", "zipf", "alike", "short"])
def test_about_the_right_share_of_sequences_is_exempt(text: str, share: float) -> None:
    count = 4000
    texts = {
        "uniform": lambda: torch.randint(102_400, (count, 33)),
        "zipf": lambda: (torch.rand(count, 33) ** 6 * 500).long(),
        # one token of 33 differs, and by little
        "alike": lambda: torch.full((count, 33), 7).index_fill(1, torch.tensor([5]), 0) + torch.arange(count)[:, None],
        "short": lambda: torch.arange(count)[:, None],
    }
    drawn = exempt_sequences(texts[text](), share)
    assert drawn.shape == (count, 1)
    assert drawn.dtype == torch.bool
    spread = 5 * math.sqrt(share * (1 - share) / count)  # five standard errors of a fair draw
    assert drawn.double().mean().item() == pytest.approx(share, abs=max(spread, 1e-9))


def test_exemption_follows_from_the_text_of_the_sequence_alone() -> None:
    tokens = torch.randint(1000, (40, 17))
    drawn = exempt_sequences(tokens, 0.4)
    order = torch.randperm(40)
    assert torch.equal(exempt_sequences(tokens, 0.4), drawn)
    assert torch.equal(exempt_sequences(tokens[order], 0.4), drawn[order])
    cut = [exempt_sequences(part, 0.4) for part in tokens.split([1, 3, 36])]
    assert torch.equal(torch.cat(cut), drawn)
    assert 0 < drawn.sum() < 40


def test_every_token_and_its_place_matter_to_the_draw() -> None:
    tokens = torch.randint(1000, (300, 9))
    drawn = exempt_sequences(tokens, 0.5)
    swapped = exempt_sequences(tokens.flip(1), 0.5)
    assert 0.4 < (drawn == swapped).double().mean() < 0.6
    for place in range(9):
        changed = tokens.clone()
        changed[:, place] += 1
        assert (exempt_sequences(changed, 0.5) != drawn).any(), place


def test_a_wider_share_exempts_the_same_sequences_and_more() -> None:
    tokens = torch.randint(1000, (500, 9))
    narrow, wide = (exempt_sequences(tokens, share) for share in (0.1, 0.3))
    assert (wide | ~narrow).all()
    assert wide.sum() > narrow.sum()


def test_exemption_of_very_long_sequences_does_not_overflow() -> None:
    tokens = torch.full((32, 100_000), 129_279)  # the sum of so many products is near the end of int64
    tokens[:, 0] = torch.arange(32)
    assert 4 < exempt_sequences(tokens, 0.5).sum() < 28


CROWDED: dict[str, Any] = {"num_routed_experts": 6, "experts_per_token": 2, "balance": {"num_devices": 3}}


@pytest.mark.parametrize("level", ["expert", "device"])
@pytest.mark.parametrize("kind", ["softmax_topk", "group_limited", "sigmoid_biased", "hash_layer"])
def test_layer_drops_only_in_training_and_never_from_exempt_sequences(level: str, kind: str) -> None:
    table = moe_table(kind, **CROWDED, capacity_factor=0.5, capacity_level=level, capacity_exempt=0.5)
    layer, hidden = moe_layer(table), torch.randn(8, 6, 16)
    tokens = torch.randint(VOCAB, (8, 6))
    exempt = exempt_sequences(tokens, 0.5)[:, 0]
    assert 0 < exempt.sum() < 8
    with torch.no_grad():
        output, record = layer.train()(hidden, tokens, constraint=None, record=True)
        whole, unlimited = layer.eval()(hidden, tokens, constraint=None, record=True)
    assert unlimited.dropped == 0
    assert record.dropped > 0
    assert torch.equal(record.load, unlimited.load)
    torch.testing.assert_close(output[exempt], whole[exempt], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output[~exempt], whole[~exempt], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exempt", [0.0, 0.5])
@pytest.mark.parametrize("kernel", ["loop", "sorted_slices"])
def test_layer_with_device_capacity_is_the_masked_oracle(kernel: str, exempt: float) -> None:
    table = moe_table(
        **CROWDED, num_shared_experts=0, capacity_factor=1.0, capacity_level="device", capacity_exempt=exempt
    )
    layer = moe_layer(table, experts=kernel).double()
    hidden, tokens = torch.randn(6, 5, 16, dtype=torch.float64, requires_grad=True), torch.randint(VOCAB, (6, 5))
    crowd = RoutingConstraint(allowed=torch.tensor([True, True, True, False, True, False]))
    output, record = layer(hidden, tokens, constraint=crowd, record=True)
    ids, gates = record.decision.expert_ids, record.decision.gate_weights
    privileged = exempt_sequences(tokens, exempt).expand(6, 5).flatten()
    keep = oracle.kept_on_devices(ids, gates, 6, 3, 1.0, privileged)
    assert 0 < record.dropped == (~keep).sum()
    dense = torch.zeros(30, 6, dtype=torch.float64).scatter(1, ids, gates.double() * keep)
    experts = oracle.unstack(layer.experts.gate_up_proj, layer.experts.down_proj)
    expected = oracle.dense_masked_moe(hidden.flatten(0, 1), dense, experts, []).view_as(hidden)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    direction, leaves = torch.randn_like(output), (hidden, *layer.parameters())
    found = torch.autograd.grad((output * direction).sum(), leaves, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((expected * direction).sum(), leaves), rtol=1e-5, atol=1e-6)
