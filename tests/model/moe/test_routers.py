"""Routers at the edges: extreme scores, and the refusals of the hash layer."""

from __future__ import annotations

import pytest
import torch

from finemoe.model.initialize import initialize
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.routers.hash_layer import HashLayerConfig, HashLayerRouter
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig, SoftmaxTopKRouter
from finemoe.model.transformer import Transformer
from oracles.models import build, moe_table, small_config


def softmax_router(logits: list[float], k: int, **config: object) -> SoftmaxTopKRouter:
    """A router that gives these logits for a hidden state of 1."""
    router = SoftmaxTopKRouter(SoftmaxTopKConfig.model_validate(config), 1, len(logits), k, 1)
    router.weight.data = torch.tensor(logits)[:, None]
    return router


ONE, ID = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)


def test_gates_are_the_softmax_over_all_experts() -> None:
    decision = softmax_router([0.0, 2.0, 1.0, -1.0], 2)(ONE, ID, None)
    scores = torch.tensor([0.0, 2.0, 1.0, -1.0]).softmax(0)
    assert decision.expert_ids.tolist() == [[1, 2]]
    torch.testing.assert_close(decision.gate_weights[0], scores[[1, 2]])
    assert decision.gate_weights.sum() < 0.95  # not renormalised


def test_normalised_gates_sum_to_the_route_scale() -> None:
    decision = softmax_router([0.0, 2.0, 1.0, -1.0], 3, normalize_gates=True, route_scale=2.5)(ONE, ID, None)
    assert decision.gate_weights.sum().item() == pytest.approx(2.5)
    expected = 2.5 * torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    torch.testing.assert_close(decision.gate_weights[0], expected)


def test_normalised_gates_survive_the_knock_out_of_the_only_likely_expert() -> None:
    # With expert 0 at 200 the scores of the others round to 0 in float32, and 0 / 0 is not a gate.
    router = softmax_router([200.0, 1.0, 0.0, 0.0], 2, normalize_gates=True)
    constraint = RoutingConstraint(allowed=torch.tensor([False, True, True, False]))
    gates = router(ONE, ID, constraint).gate_weights
    torch.testing.assert_close(gates, torch.tensor([[1.0, 0.0]]).softmax(-1))


def test_router_computes_in_float32_under_autocast() -> None:
    router = softmax_router([1.0, 1.001], 1)
    with torch.autocast("cpu", torch.bfloat16):
        decision = router(ONE, ID, None)
    assert decision.expert_ids.item() == 1  # in bfloat16 the two logits would be equal
    assert decision.scores.dtype == decision.logits.dtype == torch.float32


def test_hash_layer_moves_to_the_next_allowed_expert() -> None:
    router = HashLayerRouter(HashLayerConfig(), 4, 5, 2, 3)
    router.expert_of_token.copy_(torch.tensor([[4, 1], [3, 4], [0, 2]]))
    constraint = RoutingConstraint(allowed=torch.tensor([True, True, False, True, False]))
    ids = router(torch.zeros(3, 4), torch.arange(3), constraint).expert_ids
    assert ids.tolist() == [[0, 1], [3, 0], [0, 3]]


def test_hash_layer_activates_more_experts_than_its_table_holds() -> None:
    router = HashLayerRouter(HashLayerConfig(), 4, 4, 1, 2)
    router.expert_of_token.copy_(torch.tensor([[1], [3]]))
    decision = router(torch.zeros(2, 4), torch.arange(2), RoutingConstraint(num_active=3))
    assert [set(row) for row in decision.expert_ids.tolist()] == [{1, 2, 3}, {3, 0, 1}]
    torch.testing.assert_close(decision.gate_weights, torch.full((2, 3), 1 / 3))


def test_balanced_table_needs_frequencies() -> None:
    table = moe_table("hash_layer", router={"kind": "hash_layer", "table": "balanced"})
    model = Transformer(small_config(feed_forward=table))
    with pytest.raises(ValueError, match="needs the token frequencies"):
        initialize(model, 0)


def test_hash_table_travels_with_the_weights() -> None:
    config = small_config(feed_forward=moe_table("hash_layer"))
    model, other = build(config, 0), build(config, 1)
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 5))
    assert torch.equal(model(tokens).hidden, other(tokens).hidden)
