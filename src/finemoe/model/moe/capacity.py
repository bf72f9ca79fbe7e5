"""Capacity: how many assignments one expert takes from a batch, and which are dropped beyond that.

Switch section 2.2 and GShard section 3.2. Off by default: DeepSeekMoE's own baselines drop nothing (section 4.1).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def kept_assignments(expert_ids: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """Which assignments `[tokens, k]` fit, with capacity = ceil(tokens · k / experts · capacity_factor) each.

    All first choices are served before any second choice (GShard Algorithm 1); within a choice, earlier tokens first.
    """
    tokens, k = expert_ids.shape
    # Exact: 200 / 4 * 1.1 is a little over 55 in floating point, and its ceiling one too large.
    capacity = math.ceil(Fraction(tokens * k, num_experts) * Fraction(str(capacity_factor)))
    by_choice = expert_ids.t().reshape(-1)
    order = by_choice.argsort(stable=True)
    counts = torch.bincount(by_choice, minlength=num_experts)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[by_choice[order]]
    return (rank < capacity).view(k, tokens).t()
