"""Masked best experts, parts of a layer left out, and passes that go on from a block, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.layer import MoELayer
from finemoe.model.moe.routers import ROUTERS
from oracles import moe as moe_oracle
from oracles import routing as oracle
from oracles.models import GROUPS, VOCAB, build, moe_layer, moe_table, small_config, v3_config

HIDDEN, EXPERTS, TOKENS = 6, 12, 24
LIMITED = {"num_groups": 4, "groups_per_token": 2}

CASES: dict[str, tuple[dict[str, Any], int, str, int]] = {
    # table, experts per token, scores, experts that speak for a group
    "softmax": ({"kind": "softmax_topk"}, 3, "softmax", 1),
    "softmax, normalised": ({"kind": "softmax_topk", "normalize_gates": True}, 3, "softmax", 1),
    "groups": ({"kind": "group_limited", **LIMITED}, 3, "softmax", 1),
    "biased": ({"kind": "sigmoid_biased"}, 3, "sigmoid", 2),
    "biased, groups": ({"kind": "sigmoid_biased", **LIMITED}, 4, "sigmoid", 2),
    "V4's score": ({"kind": "sigmoid_biased", "score_function": "sqrtsoftplus"}, 2, "sqrtsoftplus", 2),
}


def test_every_router_has_a_case() -> None:
    assert {table["kind"] for table, *_ in CASES.values()} | {"hash_layer"} == set(ROUTERS)


def drawn(case: str) -> Any:
    table, k, _, _ = CASES[case]
    config, router = ROUTERS[table["kind"]]
    built: Any = router(config.model_validate(table), HIDDEN, EXPERTS, k, 1)  # type: ignore[call-arg]
    torch.nn.init.normal_(built.weight)
    if table["kind"] == "sigmoid_biased":
        built.selection_bias.normal_(0, 0.5)
    return built


def expected(case: str, router: Any, hidden: Tensor, masked: int, k: int, allowed: Tensor) -> list[list[int]]:
    """Take away the `masked` best of the groups that count, then of the others; then choose as the paper does."""
    table, _, function, best = CASES[case]
    bias = dict(router.named_buffers()).get("selection_bias", torch.zeros(EXPERTS)).tolist()
    chosen = []
    for row, there in zip((hidden.double() @ router.weight.double().T).tolist(), allowed.tolist(), strict=True):
        merits = [s + b for s, b in zip(oracle.SCORES[function](row), bias, strict=True)]
        limits = {"num_groups": table.get("num_groups", 1), "per_token": table.get("groups_per_token", 1), "best": best}
        inside = oracle.reachable(merits, **limits, allowed=there)
        first = sorted((e for e in range(EXPERTS) if there[e]), key=lambda e: (e not in inside, -merits[e]))[:masked]
        left = [there[e] and e not in first for e in range(EXPERTS)]
        chosen.append(oracle.choose(merits, k, **limits, allowed=left))
    return chosen


@pytest.mark.parametrize("active", [None, 1, 5])
@pytest.mark.parametrize("masked", [1, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_masking_leaves_out_the_best_of_each_token(case: str, masked: int, active: int | None) -> None:
    router, hidden, k = drawn(case), torch.randn(TOKENS, HIDDEN), active or CASES[case][1]
    tokens, everyone = torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS, EXPERTS, dtype=torch.bool)
    decision = router(hidden, tokens, RoutingConstraint(num_masked=masked, num_active=active))
    assert decision.expert_ids.tolist() == expected(case, router, hidden, masked, k, everyone)
    gates = decision.scores.gather(1, decision.expert_ids)
    if router.config.model_dump().get("normalize_gates"):
        gates = gates / gates.sum(dim=1, keepdim=True)
    torch.testing.assert_close(decision.gate_weights, gates * router.config.route_scale)


@pytest.mark.parametrize("case", CASES)
def test_masked_experts_are_those_the_token_would_have_chosen(case: str) -> None:
    """Of limited groups too: the best experts of the others were never a choice."""
    router, hidden, tokens = drawn(case), torch.randn(300, HIDDEN), torch.zeros(300, dtype=torch.int64)
    plain = router(hidden, tokens, None).expert_ids
    for masked in (1, 2, 3):
        left = router(hidden, tokens, RoutingConstraint(num_masked=masked, num_active=3)).expert_ids
        first = plain[:, :masked]
        assert not (left[:, :, None] == first[:, None, :]).any()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_masking_counts_only_experts_that_are_allowed(case: str, per_token: bool) -> None:
    router, hidden = drawn(case), torch.randn(TOKENS, HIDDEN)
    allowed = torch.rand(TOKENS, EXPERTS) < 0.6
    allowed[:, ::2] = True  # six stay: two are masked, and up to four are chosen
    allowed = allowed if per_token else allowed[0]
    decision = router(hidden, torch.zeros(TOKENS, dtype=torch.int64), RoutingConstraint(allowed=allowed, num_masked=2))
    spread = allowed.expand(TOKENS, EXPERTS)
    assert decision.expert_ids.tolist() == expected(case, router, hidden, 2, CASES[case][1], spread)
    assert spread.gather(1, decision.expert_ids).all()


@pytest.mark.parametrize("case", CASES)
def test_masking_nothing_changes_nothing(case: str) -> None:
    router, hidden, tokens = drawn(case), torch.randn(TOKENS, HIDDEN), torch.zeros(TOKENS, dtype=torch.int64)
    plain, constrained = router(hidden, tokens, None), router(hidden, tokens, RoutingConstraint(num_masked=0))
    assert torch.equal(plain.expert_ids, constrained.expert_ids)
    assert torch.equal(plain.gate_weights, constrained.gate_weights)


# ---- the fixed table ----


def walk(own: list[int], count: int, there: set[int], experts: int) -> list[int]:
    """The table's experts in order, each or the next that is there and free; after the last one, on round."""
    taken: list[int] = []
    for wish in (own + [own[-1]] * count)[:count]:
        while wish not in there or wish in taken:
            wish = (wish + 1) % experts
        taken.append(wish)
    return taken


@pytest.mark.parametrize("allowed", [None, [0, 1, 3, 4, 6, 7]])
@pytest.mark.parametrize("active", [None, 1, 3])
@pytest.mark.parametrize("masked", [0, 1, 2, 3])
def test_a_fixed_table_masks_its_own_experts_first(masked: int, active: int | None, allowed: list[int] | None) -> None:
    config, router = ROUTERS["hash_layer"]
    built: Any = router(config(), 4, 8, 2, 30)  # type: ignore[call-arg]
    built.fill_table(torch.Generator().manual_seed(1), None)
    mask = None if allowed is None else torch.tensor([e in allowed for e in range(8)])
    tokens = torch.arange(30)
    decision = built(torch.zeros(30, 4), tokens, RoutingConstraint(allowed=mask, num_masked=masked, num_active=active))
    there = set(range(8)) if allowed is None else set(allowed)
    for token, ids in enumerate(decision.expert_ids.tolist()):
        own = built.expert_of_token[token].tolist()
        assert ids == walk(own, active or 2, there - set(walk(own, masked, there, 8)), 8)


# ---- parts of a layer ----


def parts(layer: MoELayer, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """What the routed and what the shared experts add, every expert run on every token."""
    routed = moe_oracle.unstack(layer.experts.gate_up_proj, layer.experts.down_proj)
    shared = layer.shared_experts
    assert shared is not None
    one = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    return moe_oracle.dense_masked_moe(x, gates, routed, []), moe_oracle.swiglu(x, *one)


@pytest.mark.parametrize("fields", [{}, {"num_masked": 2}, {"num_active": 3}], ids=str)
@pytest.mark.parametrize(("routed", "shared"), [(True, True), (False, True), (True, False), (False, False)])
def test_parts_of_a_layer_can_be_left_out(routed: bool, shared: bool, fields: dict[str, Any]) -> None:
    layer = moe_layer(moe_table()).eval()
    hidden, tokens = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.int64)
    constraint = RoutingConstraint(routed=routed, shared=shared, **fields)
    with torch.no_grad():
        output, record = layer(hidden, tokens, constraint=constraint, record=True)
        assert record.decision is not None
        ids, weights = record.decision.expert_ids, record.decision.gate_weights
        gates = torch.zeros(14, 6).scatter_(1, ids, weights)
        of_routed, of_shared = parts(layer, hidden.view(14, 16), gates)
    torch.testing.assert_close(output.view(14, 16), of_routed * routed + of_shared * shared, rtol=1e-4, atol=1e-5)
    assert int(record.load.sum()) == ids.numel() == 14 * fields.get("num_active", 2)


# ---- passes that go on from a block ----

MODELS: dict[str, ModelConfig] = {
    "DeepSeekMoE": small_config(num_layers=4),
    "V3": v3_config(num_layers=4, mtp_depth=0),
    "hash": small_config(num_layers=4, feed_forward=moe_table("hash_layer")),
    "groups": small_config(num_layers=4, feed_forward=moe_table(router={"kind": "group_limited", **GROUPS})),
}


@pytest.mark.parametrize("native", ["torch", "native"])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_going_on_from_any_block_equals_the_whole_pass(name: str, isolated: bool, native: str) -> None:
    model = build(MODELS[name], products=native).eval()
    tokens = torch.randint(VOCAB, (3, 9))
    placed: dict[str, Tensor] = {}
    if isolated:
        placed = {
            "documents": torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]).expand(3, 9),
            "positions": torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1]).expand(3, 9),
        }
    whole = model(tokens, record=True, states=True, **placed)
    assert len(whole.states) == 4
    torch.testing.assert_close(whole.states[0], model.embedding(tokens), rtol=0, atol=0)
    for layer in range(4):
        again = model(tokens, record=True, start=(layer, whole.states[layer]), **placed)
        assert torch.equal(again.hidden, whole.hidden)
        assert set(again.routing) == {number for number in whole.routing if number >= layer}
        constraint = {layer: RoutingConstraint(num_masked=1), 3: RoutingConstraint(shared=False, num_active=1)}
        short = model(tokens, constraint=constraint, start=(layer, whole.states[layer]), **placed)
        long = model(tokens, constraint=constraint, **placed)
        assert torch.equal(short.hidden, long.hidden)
        assert layer == 0 or not torch.allclose(short.hidden, whole.hidden)


@torch.no_grad()
def test_states_of_a_later_start_begin_there() -> None:
    model = build(MODELS["DeepSeekMoE"]).eval()
    tokens = torch.randint(VOCAB, (2, 5))
    whole = model(tokens, states=True)
    later = model(tokens, states=True, start=(2, whole.states[2]))
    assert len(later.states) == 2
    assert all(torch.equal(a, b) for a, b in zip(later.states, whole.states[2:], strict=True))
    assert model(tokens).states == ()


@torch.no_grad()
def test_rows_of_a_batch_can_go_on_alone() -> None:
    model = build(MODELS["V3"]).eval()
    tokens = torch.randint(VOCAB, (4, 6))
    whole = model(tokens, states=True)
    rows = torch.tensor([2, 0])
    some = model(tokens[rows], start=(2, whole.states[2][rows]))
    torch.testing.assert_close(some.hidden, whole.hidden[rows], rtol=1e-5, atol=1e-6)
