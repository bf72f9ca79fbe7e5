"""Softmax over all experts, then the top k: Switch (k=1), GShard (k=2), DeepSeekMoE and V2-Lite."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision
from finemoe.model.moe.routers.select import Parts, float32_logits, select


class SoftmaxTopKConfig(Config):
    """As published by DeepSeekMoE (eq. 10-11) the chosen gates are neither renormalised nor scaled."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    learned: ClassVar[bool] = True
    scores_sum_to_one: ClassVar[bool] = True
    selects_with_bias: ClassVar[bool] = False
    normalize_gates: bool = False
    """Divide the chosen gates by their sum."""
    route_scale: PositiveFloat = 1.0
    """[factor] Multiply the gates, after any normalisation."""

    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """One centroid per expert."""
        return hidden_size * num_experts


class SoftmaxTopKRouter(nn.Module):
    """DeepSeekMoE eq. 10-11: s = softmax(u eᵀ), g = s where s is among the top k."""

    def __init__(
        self,
        config: SoftmaxTopKConfig,
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
        return (
            self.weight,
            None,
            0,
            self.experts_per_token,
            1,
            1,
            1,
            self.config.normalize_gates,
            self.config.route_scale,
        )

    def forward(self, hidden: Tensor, tokens: Tensor, constraint: RoutingConstraint | None) -> RoutingDecision:
        """`hidden [tokens, hidden]`; `tokens [tokens]` ids, unused here."""
        logits = float32_logits(hidden, self.weight)
        scores = logits.softmax(dim=-1)
        expert_ids = select(scores.detach(), self.experts_per_token, constraint)
        if self.config.normalize_gates:
            # scores over their sum, but never 0 / 0 where a constraint leaves experts whose scores round to 0
            gates = logits.gather(-1, expert_ids).softmax(dim=-1)
        else:
            gates = scores.gather(-1, expert_ids)
        return RoutingDecision(expert_ids, gates * self.config.route_scale, scores, logits)
