"""Top-k selection under a constraint, shared by the routers."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.model.moe.decision import RoutingConstraint


def select(scores: Tensor, k: int, constraint: RoutingConstraint | None) -> Tensor:
    """The ids `[tokens, k]` of the best-scored experts of `scores [tokens, experts]`, best first.

    Disallowed experts stand at minus infinity, never at 0: a score may itself be negative.
    """
    if constraint is None:
        return scores.topk(k, dim=-1).indices
    if constraint.replay is not None:
        return constraint.replay
    if constraint.num_active is not None:
        k = constraint.num_active
    if constraint.allowed is not None:
        scores = scores.masked_fill(~constraint.allowed, -torch.inf)
    return scores.topk(k, dim=-1).indices
