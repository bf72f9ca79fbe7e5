"""DeepSeek-V2's router: softmax gates, experts from the few groups that hold the best of them (V2 section 2.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision
from finemoe.model.moe.routers.select import GroupsConfig, Parts, float32_logits, select_in_groups


class GroupLimitedConfig(GroupsConfig):
    """V2: 8 groups, 3 per token, gates multiplied by 16 and not normalised. V2-Lite has no groups: `softmax_topk`."""

    kind: Literal["group_limited"] = "group_limited"
    learned: ClassVar[bool] = True
    scores_sum_to_one: ClassVar[bool] = True
    selects_with_bias: ClassVar[bool] = False
    route_scale: PositiveFloat = 1.0
    """[factor] Multiply the gates."""

    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """One centroid per expert."""
        return hidden_size * num_experts


class GroupLimitedRouter(nn.Module):
    """s = softmax(u eᵀ); a group's score is its largest s; the top k within the best groups."""

    def __init__(
        self,
        config: GroupLimitedConfig,
        hidden_size: int,
        num_experts: int,
        experts_per_token: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts_per_token = experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset(self, draw: torch.Generator, frequencies: Callable[[], Tensor] | None) -> None:
        """Nothing is held beside the weights."""

    def parts(self) -> Parts:
        """What C++ computes with."""
        groups = (self.config.num_groups, self.config.groups_per_token, 1)
        return self.weight, None, 0, self.experts_per_token, *groups, False, self.config.route_scale

    def forward(self, hidden: Tensor, tokens: Tensor, constraint: RoutingConstraint | None) -> RoutingDecision:
        """`hidden [tokens, hidden]`; `tokens [tokens]` ids, unused here."""
        logits = float32_logits(hidden, self.weight)
        scores = logits.softmax(dim=-1)
        expert_ids = select_in_groups(scores.detach(), self.experts_per_token, constraint, self.config, best=1)
        gates = scores.gather(-1, expert_ids) * self.config.route_scale
        return RoutingDecision(expert_ids, gates, scores, logits)
