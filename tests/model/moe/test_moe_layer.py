"""The MoE layer against every expert on every token with masked gates (DeepSeekMoE equations 9 to 11)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.layer import MoELayer
from oracles import moe, routing
from oracles.models import GROUPS, VOCAB, moe_layer, moe_table


@dataclass(frozen=True)
class Case:
    """One configuration of the layer, and the batch it sees."""

    changes: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (3, 4)
    allowed: tuple[int, ...] | None = None
    """Experts that may be chosen; the others stay empty."""
    all_on: int | None = None
    """One expert that takes every token."""

    def constraint(self) -> RoutingConstraint | None:
        """What holds the router to this case."""
        tokens = self.shape[0] * self.shape[1]
        if self.all_on is not None:
            return RoutingConstraint(replay=torch.full((tokens, 1), self.all_on))
        if self.allowed is not None:
            return RoutingConstraint(allowed=torch.tensor([e in self.allowed for e in range(6)]))
        return None


CASES = {
    "plain": Case(),
    "no shared expert": Case({"num_shared_experts": 0}),
    "two shared experts": Case({"num_shared_experts": 2}),
    "one token": Case(shape=(1, 1)),
    "one expert": Case({"num_routed_experts": 1, "experts_per_token": 1}),
    "k = experts": Case({"experts_per_token": 6}),
    "empty experts": Case(allowed=(1, 4)),
    "all tokens on one expert": Case({"experts_per_token": 1}, all_on=3),
    "capacity drops some": Case({"capacity_factor": 0.5}),
    "capacity of one row": Case({"capacity_factor": 0.01}),
    "all on one expert, most dropped": Case({"experts_per_token": 1, "capacity_factor": 1.0}, all_on=5),
    "normalised and scaled gates": Case(router={"normalize_gates": True, "route_scale": 2.5}),
    "normalised, some dropped": Case({"capacity_factor": 0.5}, router={"normalize_gates": True}),
    "groups, scaled": Case(router={"kind": "group_limited", "route_scale": 16.0, **GROUPS}),
    "groups, some dropped": Case({"capacity_factor": 0.5}, router={"kind": "group_limited", **GROUPS}),
    "biased": Case(router={"kind": "sigmoid_biased", "route_scale": 2.5, **GROUPS}),
    "biased, raw gates": Case(router={"kind": "sigmoid_biased", "normalize_gates": False}),
    "biased, empty experts": Case(router={"kind": "sigmoid_biased", **GROUPS}, allowed=(1, 2, 4)),
    "sqrtsoftplus, clamped": Case(
        {"swiglu_limit": 0.1}, router={"kind": "sigmoid_biased", "score_function": "sqrtsoftplus"}
    ),
    "clamped": Case({"swiglu_limit": 0.1, "num_shared_experts": 2}),
    "gated shared expert": Case({"gate_shared_experts": True}),
    "gated shared experts": Case({"gate_shared_experts": True}),
    "gated shared experts, clamped": Case({"gate_shared_experts": True, "num_shared_experts": 2, "swiglu_limit": 0.1}),
}


def routed(layer: MoELayer, x: Tensor, constraint: RoutingConstraint | None) -> tuple[list[list[int]], Tensor]:
    """Each token's experts, and its gate for every expert."""
    config, router, k = layer.config, layer.config.router, layer.config.experts_per_token
    logits = x @ layer.router.weight.T
    if router.kind == "softmax_topk":
        return moe.chosen_gates(
            logits.softmax(-1),
            k,
            normalize=router.normalize_gates,
            scale=router.route_scale,
            allowed=constraint and constraint.allowed,
            replay=constraint and constraint.replay,
        )
    biased = router.kind == "sigmoid_biased"
    if biased:
        scores = logits.sigmoid() if router.score_function == "sigmoid" else torch.log(1 + torch.exp(logits)).sqrt()
    else:
        scores = logits.softmax(-1)
    merits = (scores + layer.router.selection_bias if biased else scores).tolist()
    groups = {"num_groups": router.num_groups, "per_token": router.groups_per_token, "best": 2 if biased else 1}
    allowed = None if constraint is None else constraint.allowed.tolist()
    ids = [routing.choose(row, k, **groups, allowed=allowed) for row in merits]
    normalize = biased and router.normalize_gates
    chosen = routing.gates_of(scores, ids, normalize=normalize, scale=router.route_scale)
    zeros = x.new_zeros(len(x), config.num_routed_experts)
    return ids, zeros.scatter(1, torch.tensor(ids), chosen)


def oracle(layer: MoELayer, hidden: Tensor, constraint: RoutingConstraint | None) -> tuple[Tensor, list[list[int]]]:
    """The layer's output, and each token's experts, from its own weights."""
    config, x = layer.config, hidden.flatten(0, 1)
    ids, gates = routed(layer, x, constraint)
    if config.capacity_factor is not None:
        keep = moe.kept(torch.tensor(ids), config.num_routed_experts, config.capacity_factor)
        dropped = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, torch.tensor(ids), ~keep)
        gates = gates * ~dropped
    limit = config.swiglu_limit or math.inf
    output = moe.dense_masked_moe(x, gates, moe.unstack(layer.experts.gate_up_proj, layer.experts.down_proj), [], limit)
    if layer.shared_experts is not None:
        s = layer.shared_experts
        weights = (s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight)
        shared = moe.separate(*weights, config.num_shared_experts)
        assert len(shared) == config.num_shared_experts
        gate = 1.0 if layer.shared_gate is None else 1 / (1 + torch.exp(-x @ layer.shared_gate.weight.T))
        output = output + gate * moe.dense_masked_moe(x, gates, [], shared, limit)
    return output.view_as(hidden), ids


def make(case: Case, kernel: str, dtype: torch.dtype) -> tuple[MoELayer, Tensor, Tensor]:
    """A layer, its input and token ids."""
    table = moe_table(**case.changes)
    table["router"] |= case.router
    layer = moe_layer(table, experts=kernel).to(dtype)
    for bias in layer.router.buffers():
        bias.normal_(0, 0.3)
    hidden = torch.randn(*case.shape, 16, dtype=dtype, requires_grad=True)
    return layer, hidden, torch.randint(VOCAB, case.shape)


def gradients(output: Tensor, layer: MoELayer, hidden: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Gradients of <output, direction> by name, the input's too."""
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    found = torch.autograd.grad((output * direction).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_are_those_of_every_expert_on_every_token(case: Case, kernel: str) -> None:
    # In double precision; the router itself rounds to float32, hence 1e-6 rather than 1e-12.
    layer, hidden, tokens = make(case, kernel, torch.float64)
    output, record = layer(hidden, tokens, constraint=case.constraint(), record=True)
    expected, ids = oracle(layer, hidden, case.constraint())
    assert record.decision.expert_ids.tolist() == ids
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(output)
    found = gradients(output, layer, hidden, direction)
    for name, gradient in gradients(expected, layer, hidden, direction).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize(
    "name",
    ["plain", "empty experts", "capacity drops some", "two shared experts", "biased", "gated shared experts"],
)
def test_bfloat16_autocast_stays_within_two_percent_of_the_oracle(name: str, kernel: str) -> None:
    # bfloat16 rounds to 2^-9 = 0.2 %; a handful of roundings make well under 2 % of the norm,
    # where a wrong choice of expert or a lost one moves tens of per cent. No clamp here: its gradient has a step, which
    # rounding may cross.
    case = CASES[name]
    layer, hidden, tokens = make(case, kernel, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, record = layer(hidden, tokens, constraint=case.constraint(), record=True)
    expected, ids = oracle(layer, hidden, case.constraint())
    assert output.dtype == torch.bfloat16
    assert record.decision.scores.dtype == torch.float32
    assert record.decision.expert_ids.tolist() == ids
    direction = torch.randn_like(expected)
    found = {"output": output, **gradients(output.float(), layer, hidden, direction)}
    for key, value in {"output": expected, **gradients(expected, layer, hidden, direction)}.items():
        assert (found[key].float() - value).norm() < 0.02 * value.norm(), key


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_record_counts_what_was_chosen_and_what_was_dropped(case: Case) -> None:
    layer, hidden, tokens = make(case, "loop", torch.float32)
    _, record = layer(hidden, tokens, constraint=case.constraint(), record=False)
    _, ids = oracle(layer, hidden, case.constraint())
    chosen = [expert for row in ids for expert in row]
    experts, factor = layer.config.num_routed_experts, layer.config.capacity_factor
    dropped = 0 if factor is None else int((~moe.kept(torch.tensor(ids), experts, factor)).sum())
    assert record.load.tolist() == [chosen.count(expert) for expert in range(experts)]
    assert record.dropped.item() == dropped
    assert record.decision is None


def test_hash_layer_averages_its_experts() -> None:
    layer = moe_layer(moe_table("hash_layer", num_shared_experts=0))
    hidden, tokens = torch.randn(2, 5, 16), torch.randint(VOCAB, (2, 5))
    output, _ = layer(hidden, tokens, constraint=None, record=False)
    gates = torch.zeros(10, 6).scatter_(1, layer.router.expert_of_token[tokens.flatten()], 0.5)
    experts = moe.unstack(layer.experts.gate_up_proj, layer.experts.down_proj)
    expected = moe.dense_masked_moe(hidden.flatten(0, 1), gates, experts, [])
    torch.testing.assert_close(output, expected.view_as(hidden), rtol=1e-4, atol=1e-5)
