"""Score functions, and top-k selection under a constraint and a limit on groups: what the routers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional as F

from finemoe.core.config import Config
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.native.exact import top_k

SCORE_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    # DeepSeek-V4. The root of a softplus that has underflowed to 0 would have a gradient of 0 · infinity.
    "sqrtsoftplus": lambda logits: F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt(),
}

Parts = tuple[Tensor, Tensor | None, int, int, int, int, int, bool, float]
"""A learned router as native/routing.h has it: weight, bias, number of the score function in SCORE_FUNCTIONS, k, 
groups, groups per token, how many of a group's scores count, whether gates are normalised, what multiplies them."""


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """`[tokens, experts]` from `hidden [tokens, hidden]` and centroids `weight [experts, hidden]`, never narrower.

    Float64 stays what it is: it is there to tell an error from rounding.

    Whatever the model's precision: rounded logits change which experts win.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(wide) @ weight.to(wide).t()


class GroupsConfig(Config, ABC):
    """Device- or node-limited routing: experts lie in consecutive groups, and a token uses only some of the groups."""

    num_groups: PositiveInt = 1
    """[groups] D of V2 section 2.2.2; 1: no groups."""
    groups_per_token: PositiveInt = 1
    """[groups] M: the most groups that a token's experts may lie in."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token {self.groups_per_token} is above num_groups {self.num_groups}")
        return self

    @abstractmethod
    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """Weights of the router."""

    def check_experts(self, num_experts: int, experts_per_token: int) -> None:
        """Whether that many experts can be cut into these groups.

        Raises:
            ValueError: they cannot, or the groups of a token hold too few.
        """
        if num_experts % self.num_groups:
            raise ValueError(
                f"router.num_groups {self.num_groups} does not divide num_routed_experts {num_experts}: "
                "every group must hold the same number of experts"
            )
        reach = num_experts // self.num_groups * self.groups_per_token
        if experts_per_token > reach:
            raise ValueError(
                f"experts_per_token {experts_per_token} is above the {reach} experts that "
                f"router.groups_per_token {self.groups_per_token} leaves to choose from"
            )


def select(scores: Tensor, k: int, constraint: RoutingConstraint | None) -> Tensor:
    """The ids `[tokens, k]` of the best-scored experts of `scores [tokens, experts]`, best first.

    Disallowed experts stand at minus infinity, never at 0: a score may itself be negative.
    """
    if constraint is None:
        return top_k(scores, k)
    if constraint.replay is not None:
        return constraint.replay
    return top_k(permitted(scores, constraint), constraint.num_active or k)


def permitted(scores: Tensor, constraint: RoutingConstraint) -> Tensor:
    """`scores [tokens, experts]` with minus infinity where the constraint leaves an expert out."""
    scores = _allowed(scores, constraint)
    if constraint.num_masked:
        scores = scores.scatter(-1, top_k(scores, constraint.num_masked), -torch.inf)
    return _forced(scores, constraint)


def _forced(scores: Tensor, constraint: RoutingConstraint) -> Tensor:
    return scores if constraint.forced is None else scores.masked_fill(constraint.forced, torch.inf)


def _allowed(scores: Tensor, constraint: RoutingConstraint) -> Tensor:
    return scores if constraint.allowed is None else scores.masked_fill(~constraint.allowed, -torch.inf)


def select_in_groups(
    scores: Tensor, k: int, constraint: RoutingConstraint | None, groups: GroupsConfig, best: int
) -> Tensor:
    """`select` within the best groups of each token; a group counts as the sum of its `best` highest scores.

    Disallowed experts count nothing: a group with fewer than `best` left is the sum of those. A constraint may leave
    too few experts in the best groups; such a token chooses among all that are allowed. Masked are first the best
    experts of the best groups, which the token would choose, then those of the others.
    """
    if groups.num_groups == groups.groups_per_token or (constraint is not None and constraint.replay is not None):
        return select(scores, k, constraint)
    if constraint is not None:
        scores = _allowed(scores, constraint)
        if constraint.num_masked:
            falling = scores.argsort(dim=-1, descending=True, stable=True)
            outside = _within_groups(scores, groups, best).isneginf().gather(1, falling)
            ranked = falling.gather(1, outside.to(torch.int8).argsort(dim=-1, stable=True))
            scores = scores.scatter(-1, ranked[:, : constraint.num_masked], -torch.inf)
    limited = _within_groups(scores, groups, best)
    if constraint is not None:
        k = constraint.num_active or k
        starved = limited.isfinite().sum(dim=-1, keepdim=True) < k
        limited = _forced(torch.where(starved, scores, limited), constraint)
    return top_k(limited, k)


def _within_groups(scores: Tensor, groups: GroupsConfig, best: int) -> Tensor:
    """`scores [tokens, experts]` with minus infinity outside of each token's best groups."""
    grouped = scores.unflatten(-1, (groups.num_groups, -1))
    highest = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values
    empty = highest[..., 0].isneginf()
    group_scores = highest.masked_fill(highest.isneginf(), 0.0).sum(dim=-1).masked_fill(empty, -torch.inf)
    chosen = group_scores.topk(groups.groups_per_token, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
    return grouped.masked_fill(outside[:, :, None], -torch.inf).flatten(1)
