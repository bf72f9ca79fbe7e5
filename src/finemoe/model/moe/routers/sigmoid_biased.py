"""DeepSeek-V3's router: independent scores, and a bias that decides who is selected but never how much they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision
from finemoe.model.moe.routers.select import SCORE_FUNCTIONS, GroupsConfig, Parts, float32_logits, select_in_groups


class SigmoidBiasedConfig(GroupsConfig):
    """V3 section 2.1.2: 8 groups, 4 per token, gates normalised and multiplied by 2.5.

    `training/balancing.py` moves the bias after every step.
    """

    kind: Literal["sigmoid_biased"] = "sigmoid_biased"
    learned: ClassVar[bool] = True
    scores_sum_to_one: ClassVar[bool] = False
    selects_with_bias: ClassVar[bool] = True
    score_function: Literal["sigmoid", "sqrtsoftplus"] = "sigmoid"
    """Of a logit. `sqrtsoftplus` is DeepSeek-V4's."""
    normalize_gates: bool = True
    """Divide the chosen gates by their sum."""
    route_scale: PositiveFloat = 1.0
    """[factor] Multiply the gates, after any normalisation."""

    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """One centroid and one bias per expert."""
        return (hidden_size + 1) * num_experts


class SigmoidBiasedRouter(nn.Module):
    """V3 Eq. 12-16: the top k by s + b within the groups whose two best s + b sum highest; gates from s alone."""

    selection_bias: Tensor

    def __init__(
        self,
        config: SigmoidBiasedConfig,
        hidden_size: int,
        num_experts: int,
        experts_per_token: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts_per_token = experts_per_token
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        # Not a parameter: no gradient reaches it. Part of the weights all the same, always in fp32.
        self.register_buffer("selection_bias", torch.zeros(num_experts))

    def reset(self, draw: torch.Generator, frequencies: Callable[[], Tensor] | None) -> None:
        """No expert is preferred."""
        self.selection_bias.zero_()

    def parts(self) -> Parts:
        """What C++ computes with."""
        config = self.config
        score = list(SCORE_FUNCTIONS).index(config.score_function)
        groups = (config.num_groups, config.groups_per_token, 2)
        gates = (config.normalize_gates, config.route_scale)
        return self.weight, self.selection_bias, score, self.experts_per_token, *groups, *gates

    def forward(self, hidden: Tensor, tokens: Tensor, constraint: RoutingConstraint | None) -> RoutingDecision:
        """`hidden [tokens, hidden]`; `tokens [tokens]` ids, unused here."""
        logits = float32_logits(hidden, self.weight)
        scores = SCORE_FUNCTIONS[self.config.score_function](logits)
        biased = scores.detach() + self.selection_bias.float()
        expert_ids = select_in_groups(biased, self.experts_per_token, constraint, self.config, best=2)
        gates = scores.gather(-1, expert_ids)
        if self.config.normalize_gates:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # as DeepSeek's code: never 0 / 0
        return RoutingDecision(expert_ids, gates * self.config.route_scale, scores, logits)
