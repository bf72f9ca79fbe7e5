"""Capacity: how many assignments an expert or a device takes from a batch, and which are dropped beyond that.

Switch section 2.2 and GShard section 3.2 for experts; DeepSeek-V2 section 2.2.4 for devices. Off by default:
DeepSeekMoE's own baselines drop nothing (section 4.1).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from finemoe.model.moe.decision import RoutingDecision


def kept_assignments(
    expert_ids: Tensor, num_experts: int, capacity_factor: float, exempt: Tensor | None = None
) -> Tensor:
    """Which assignments `[tokens, k]` fit, with capacity = ceil(tokens · k / experts · capacity_factor) each.

    All first choices are served before any second choice (GShard Algorithm 1); within a choice, earlier tokens first.
    Tokens that are `exempt [tokens]` come before all others and are never dropped, even beyond the capacity.
    """
    tokens, k = expert_ids.shape
    by_choice = expert_ids.t().reshape(-1)
    privileged = torch.zeros_like(by_choice, dtype=torch.bool) if exempt is None else exempt.repeat(k)
    # Sorted by expert, the exempt first; a stable sort keeps choices, then tokens, in order.
    order = (by_choice * 2 + (~privileged)).argsort(stable=True)
    kept = _first_in_group(by_choice, order, num_experts, _capacity(tokens * k, num_experts, capacity_factor))
    return (kept | privileged).view(k, tokens).t()


def kept_on_devices(
    decision: RoutingDecision, num_experts: int, num_devices: int, capacity_factor: float, exempt: Tensor
) -> Tensor:
    """Which assignments `[tokens, k]` fit the budget ceil(tokens · k / devices · capacity_factor) of each device.

    On a device over its budget the assignments with the lowest gates are dropped; those of `exempt [tokens]` never.
    """
    tokens, k = decision.expert_ids.shape
    device = (decision.expert_ids // (num_experts // num_devices)).reshape(-1)
    privileged = exempt[:, None].expand(tokens, k).reshape(-1)
    gates = decision.gate_weights.detach().reshape(-1).float()
    by_gate = torch.where(privileged, torch.inf, gates).argsort(descending=True, stable=True)
    order = by_gate[device[by_gate].argsort(stable=True)]
    kept = _first_in_group(device, order, num_devices, _capacity(tokens * k, num_devices, capacity_factor))
    return (kept | privileged).view(tokens, k)


def exempt_sequences(tokens: Tensor, share: float) -> Tensor:
    """`[batch, 1]` bool: about `share` of the sequences of `tokens [batch, seq]`, drawn by a hash of their tokens.

    A pure function of the text: every layer, every cut into micro-batches and every resumed run exempts the same. (A
    multi-token prediction module reads the text from a later token on, and draws anew.)
    """
    prime = 2_147_483_647
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = ((tokens + 1) * (place * 48_271 % prime) % prime).sum(dim=1, keepdim=True)
    drawn = mixed * 69_621 % prime
    return drawn < share * prime


def _capacity(assignments: int, groups: int, factor: float) -> int:
    # Exact: 200 / 4 * 1.1 is a little over 55 in floating point, and its ceiling one too large.
    return math.ceil(Fraction(assignments, groups) * Fraction(str(factor)))


def _first_in_group(group: Tensor, order: Tensor, num_groups: int, capacity: int) -> Tensor:
    """[assignments] bool: among the first `capacity` of its group, where `order` sorts by group, the best first."""
    counts = torch.bincount(group, minlength=num_groups)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[group[order]]
    return rank < capacity
