"""V2's and V3's routers against loops over tokens, groups and experts (V2 section 2.2.2, V3 section 2.1.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelRecipe
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.routers import ROUTERS
from finemoe.model.moe.routers.select import SCORE_FUNCTIONS
from oracles import routing as oracle
from oracles.models import moe_table

HIDDEN, EXPERTS, TOKENS = 6, 12, 20

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "V2": ({"kind": "group_limited", "num_groups": 4, "groups_per_token": 2, "route_scale": 16.0}, 3),
    "V2, one group of several": ({"kind": "group_limited", "num_groups": 3, "groups_per_token": 1}, 4),
    "V2, every group": ({"kind": "group_limited", "num_groups": 4, "groups_per_token": 4}, 3),
    "V2, groups of one": ({"kind": "group_limited", "num_groups": 12, "groups_per_token": 5}, 5),
    "V3": ({"kind": "sigmoid_biased", "num_groups": 4, "groups_per_token": 2, "route_scale": 2.5}, 4),
    "V3, no groups": ({"kind": "sigmoid_biased"}, 3),
    "V3, groups of one": ({"kind": "sigmoid_biased", "num_groups": 12, "groups_per_token": 4}, 4),
    "V3, raw gates": ({"kind": "sigmoid_biased", "num_groups": 3, "groups_per_token": 2, "normalize_gates": False}, 4),
    "V4": ({"kind": "sigmoid_biased", "score_function": "sqrtsoftplus", "route_scale": 1.5}, 3),
    "V4, groups": (
        {"kind": "sigmoid_biased", "score_function": "sqrtsoftplus", "num_groups": 4, "groups_per_token": 2},
        4,
    ),
}


def drawn(case: str, bias: float = 0.5, experts: int = EXPERTS) -> Any:
    """A router with drawn centroids and, where it has one, a drawn bias."""
    table, k = CASES[case]
    config, router = ROUTERS[table["kind"]]
    built: Any = router(config.model_validate(table), HIDDEN, experts, k, 1)  # type: ignore[call-arg]
    torch.nn.init.normal_(built.weight)
    if hasattr(built, "selection_bias"):
        built.selection_bias.normal_(0, bias)
    return built


def bias_of(router: Any) -> list[float]:
    bias: Tensor | None = getattr(router, "selection_bias", None)
    return [0.0] * EXPERTS if bias is None else bias.tolist()


def expected_choice(case: str, router: Any, logits: Tensor, allowed: list[list[bool]] | None = None) -> list[list[int]]:
    """Every token's experts by the loop, from its logits."""
    table, k = CASES[case]
    function = "softmax" if table["kind"] == "group_limited" else table.get("score_function", "sigmoid")
    chosen = []
    for t, row in enumerate(logits.tolist()):
        merits = [s + b for s, b in zip(oracle.SCORES[function](row), bias_of(router), strict=True)]
        groups, per_token = table.get("num_groups", 1), table.get("groups_per_token", 1)
        best = 1 if table["kind"] == "group_limited" else 2
        there = None if allowed is None else allowed[t]
        chosen.append(oracle.choose(merits, k, num_groups=groups, per_token=per_token, best=best, allowed=there))
    return chosen


def call(router: Any, hidden: Tensor, constraint: RoutingConstraint | None = None) -> Any:
    return router(hidden, torch.zeros(len(hidden), dtype=torch.int64), constraint)


@pytest.mark.parametrize("case", CASES)
def test_choice_gates_and_gradients_are_those_of_the_loop(case: str) -> None:
    table, _ = CASES[case]
    router, hidden = drawn(case), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    decision = call(router, hidden)
    logits = hidden.double() @ router.weight.double().T
    ids = expected_choice(case, router, logits)
    assert decision.expert_ids.tolist() == ids
    if table["kind"] == "group_limited":
        scores = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    elif table.get("score_function") == "sqrtsoftplus":
        scores = torch.sqrt(torch.log(1 + torch.exp(logits)))
    else:
        scores = 1 / (1 + torch.exp(-logits))
    normalize = table["kind"] == "sigmoid_biased" and table.get("normalize_gates", True)
    gates = oracle.gates_of(scores, ids, normalize=normalize, scale=table.get("route_scale", 1.0))
    torch.testing.assert_close(decision.gate_weights.double(), gates, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decision.scores.double(), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decision.logits.double(), logits, rtol=1e-5, atol=1e-5)
    direction, leaves = torch.randn_like(gates), (hidden, router.weight)
    found = torch.autograd.grad((decision.gate_weights * direction).sum(), leaves)
    wanted = torch.autograd.grad((gates * direction).sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case, (table, _) in CASES.items() if table["kind"] == "sigmoid_biased"])
def test_masked_groups_stand_at_minus_infinity_even_where_every_biased_score_is_negative(case: str) -> None:
    # Masked with 0 instead, the experts of losing groups would beat those of the winning ones.
    router, hidden = drawn(case), torch.randn(TOKENS, HIDDEN)
    router.selection_bias -= 100
    decision = call(router, hidden)
    assert decision.expert_ids.tolist() == expected_choice(case, router, hidden.double() @ router.weight.double().T)
    assert (decision.gate_weights > 0).all()


def biased(scores: list[float], bias: list[float], k: int, **fields: Any) -> Any:
    """The decision on one token whose sigmoid scores are `scores`."""
    config, router = ROUTERS["sigmoid_biased"]
    built: Any = router(config.model_validate(fields), 1, len(scores), k, 1)  # type: ignore[call-arg]
    built.weight.data = torch.tensor(scores).logit()[:, None]
    built.selection_bias.copy_(torch.tensor(bias))
    return call(built, torch.ones(1, 1))


def test_bias_decides_who_is_selected_and_never_how_much_they_weigh() -> None:
    plain = biased([0.9, 0.8, 0.3, 0.1], [0, 0, 0, 0], 2)
    pushed = biased([0.9, 0.8, 0.3, 0.1], [-0.5, 0, 0.6, 0], 2)
    assert plain.expert_ids.tolist() == [[0, 1]]
    assert pushed.expert_ids.tolist() == [[2, 1]]  # 0.9 against 0.8: best biased first
    torch.testing.assert_close(plain.gate_weights, torch.tensor([[0.9, 0.8]]) / 1.7)
    torch.testing.assert_close(pushed.gate_weights, torch.tensor([[0.3, 0.8]]) / 1.1)
    torch.testing.assert_close(pushed.scores, torch.tensor([[0.9, 0.8, 0.3, 0.1]]))


def test_v3_ranks_groups_by_the_sum_of_their_two_best_biased_scores() -> None:
    scores, bias = [0.9, 0.1, 0.1, 0.61, 0.6, 0.1], [0.0] * 6
    one = {"num_groups": 2, "groups_per_token": 1}
    assert biased(scores, bias, 2, **one).expert_ids.tolist() == [[3, 4]]  # 1.21 against 1.0, though 0.9 is best
    bias[1] = 0.3  # 0.9 + 0.4 against 1.21
    assert biased(scores, bias, 2, **one).expert_ids.tolist() == [[0, 1]]


def test_v2_ranks_groups_by_their_best_score() -> None:
    config, router = ROUTERS["group_limited"]
    built: Any = router(config.model_validate({"num_groups": 2, "groups_per_token": 1}), 1, 6, 2, 1)  # type: ignore[call-arg]
    built.weight.data = torch.tensor([0.9, 0.1, 0.1, 0.6, 0.6, 0.1]).log()[:, None]
    decision = call(built, torch.ones(1, 1))
    assert decision.expert_ids[0, 0] == 0
    assert (decision.expert_ids < 3).all()
    assert decision.gate_weights.sum() < 0.5  # of 2.4 in all: not renormalised


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_knocked_out_experts_count_in_no_group(case: str, share: float) -> None:
    router, hidden, k = drawn(case), torch.randn(200, HIDDEN), CASES[case][1]
    allowed = torch.rand(200, EXPERTS) < share
    allowed.scatter_(1, torch.rand(200, EXPERTS).topk(k).indices, True)
    decision = call(router, hidden, RoutingConstraint(allowed=allowed))
    expected = expected_choice(case, router, hidden.double() @ router.weight.double().T, allowed.tolist())
    assert decision.expert_ids.tolist() == expected


def test_the_last_expert_of_a_group_still_counts() -> None:
    # Groups (0 1) (2 3) (4 5), two of them a token: expert 0 alone beats both of either other group.
    config, router = ROUTERS["sigmoid_biased"]
    built: Any = router(config.model_validate({"num_groups": 3, "groups_per_token": 2}), 1, 6, 2, 1)  # type: ignore[call-arg]
    built.weight.data = torch.tensor([0.95, 0.9, 0.3, 0.2, 0.2, 0.1]).logit()[:, None]
    allowed = torch.tensor([True, False, True, True, True, True])
    assert call(built, torch.ones(1, 1), RoutingConstraint(allowed=allowed)).expert_ids.tolist() == [[0, 2]]


def test_a_token_whose_groups_starve_chooses_among_all_that_are_allowed() -> None:
    config, router = ROUTERS["group_limited"]
    built: Any = router(config.model_validate({"num_groups": 3, "groups_per_token": 1}), 1, 6, 2, 1)  # type: ignore[call-arg]
    built.weight.data = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])[:, None]
    allowed = torch.tensor([[True, False, True, False, True, False], [False, False, True, True, True, False]])
    ids = call(built, torch.ones(2, 1), RoutingConstraint(allowed=allowed)).expert_ids
    assert ids.tolist() == [[0, 2], [2, 3]]


@pytest.mark.parametrize("case", CASES)
def test_more_active_experts_than_the_groups_hold(case: str) -> None:
    decision = call(drawn(case), torch.randn(TOKENS, HIDDEN), RoutingConstraint(num_active=EXPERTS))
    assert (decision.expert_ids.sort().values == torch.arange(EXPERTS)).all()


@pytest.mark.parametrize("case", CASES)
def test_replay_overrules_groups_and_bias(case: str) -> None:
    router, hidden, (table, k) = drawn(case), torch.randn(TOKENS, HIDDEN), CASES[case]
    replay = torch.rand(TOKENS, EXPERTS).topk(k).indices
    decision = call(router, hidden, RoutingConstraint(replay=replay))
    normalize = table["kind"] == "sigmoid_biased" and table.get("normalize_gates", True)
    scale = table.get("route_scale", 1.0)
    assert torch.equal(decision.expert_ids, replay)
    expected = oracle.gates_of(decision.scores, replay.tolist(), normalize=normalize, scale=scale)
    torch.testing.assert_close(decision.gate_weights, expected)


@pytest.mark.parametrize("case", ["V2", "V3", "V4"])
def test_routing_is_float32_under_autocast_and_with_narrow_hidden_states(case: str) -> None:
    router, hidden = drawn(case, bias=0.1), torch.randn(1000, HIDDEN).bfloat16()
    exact = call(router, hidden.float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = call(router, hidden)
        wide = call(router, hidden.float())
    for decision in (call(router, hidden), rounded, wide):
        for field in ("logits", "scores", "gate_weights"):
            assert getattr(decision, field).dtype == torch.float32
            assert torch.equal(getattr(decision, field), getattr(exact, field))
        assert torch.equal(decision.expert_ids, exact.expert_ids)
    # The test could fail: products in bfloat16 choose otherwise somewhere.
    with torch.no_grad():
        narrow = (hidden @ router.weight.bfloat16().T).float()
    assert expected_choice(case, router, narrow) != exact.expert_ids.tolist()


def test_narrow_weights_are_widened_before_the_product() -> None:
    router = drawn("V3").to(torch.bfloat16)
    hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
    decision = call(router, hidden)
    assert decision.logits.dtype == torch.float32
    torch.testing.assert_close(decision.logits, hidden.float() @ router.weight.float().T)


def test_bias_receives_no_gradient_and_travels_with_the_weights() -> None:
    router, other = drawn("V3"), drawn("V3")
    assert "selection_bias" not in dict(router.named_parameters())
    call(router, torch.randn(TOKENS, HIDDEN)).gate_weights.sum().backward()
    assert router.selection_bias.grad is None
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.selection_bias, router.selection_bias)


@pytest.mark.parametrize("name", SCORE_FUNCTIONS)
def test_score_functions_and_their_gradients_stay_finite_at_the_edges(name: str) -> None:
    logits = torch.tensor([[-1e4, -200.0, -104.0, -1.0, 0.0, 1.0, 200.0, 1e4]], requires_grad=True)
    scores = SCORE_FUNCTIONS[name](logits)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("function", ["sigmoid", "sqrtsoftplus"])
def test_gates_are_finite_where_every_score_underflows(function: str) -> None:
    config, router = ROUTERS["sigmoid_biased"]
    built: Any = router(config.model_validate({"score_function": function}), 1, 4, 2, 1)  # type: ignore[call-arg]
    built.weight.data = torch.tensor([-500.0, -600.0, -700.0, -800.0])[:, None]
    gates = call(built, torch.ones(1, 1)).gate_weights
    gates.sum().backward()
    assert gates.isfinite().all()
    assert built.weight.grad.isfinite().all()


REFUSED = {
    "uneven groups": ({"num_groups": 4}, 2, "router.num_groups 4 does not divide num_routed_experts 6"),
    "more groups than there are": (
        {"num_groups": 2, "groups_per_token": 3},
        2,
        "groups_per_token 3 is above num_groups 2",
    ),
    "groups too small": ({"num_groups": 3, "groups_per_token": 1}, 3, "experts_per_token 3 is above the 2 experts"),
}


@pytest.mark.parametrize("kind", ["group_limited", "sigmoid_biased"])
@pytest.mark.parametrize(("groups", "k", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_groups_are_refused(groups: dict[str, int], k: int, message: str, kind: str) -> None:
    recipe = {
        "vocab_size": 8,
        "hidden_size": 4,
        "num_layers": 1,
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 2},
        "feed_forward": moe_table(router={"kind": kind, **groups}, experts_per_token=k),
    }
    with pytest.raises(ConfigError) as error:
        parse(ModelRecipe, recipe, "recipe.toml")
    assert message in str(error.value)
