"""The MoE layer, top to bottom: route, dispatch, run experts, combine, add the shared experts (DeepSeekMoE eq. 9)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.feed_forward import SwiGLU
from finemoe.model.moe.balance import BalanceConfig, balance_terms
from finemoe.model.moe.capacity import kept_assignments
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.moe.dispatch import combine, dispatch
from finemoe.model.moe.experts import ExpertKernel, GroupedExperts
from finemoe.model.moe.routers import ROUTERS, RouterConfig


class MoEConfig(Config):
    """Routed experts, shared experts, and the router between them."""

    kind: Literal["moe"] = "moe"
    num_routed_experts: PositiveInt
    experts_per_token: PositiveInt
    expert_hidden_size: PositiveInt
    num_shared_experts: NonNegativeInt = 0
    router: RouterConfig
    balance: BalanceConfig = BalanceConfig()
    capacity_factor: PositiveFloat | None = None
    """None: dropless. Else, in training mode only, an expert takes at most this times its even share of a micro-batch.

    What a token loses then depends on its neighbours, later ones included (a second choice yields to their first), and
    on how the step is cut into micro-batches. Evaluation drops nothing, as in DeepSeek-V2 section 2.2."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_routed_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is above num_routed_experts {self.num_routed_experts}: "
                "a token cannot choose more experts than there are"
            )
        balance = self.balance
        if not self.router.learned and (balance.expert or balance.device or balance.z):
            raise ValueError(f"router {self.router.kind!r} learns nothing, so balance losses must be 0")
        if self.num_routed_experts % balance.num_devices:
            raise ValueError(
                f"balance.num_devices {balance.num_devices} does not divide num_routed_experts "
                f"{self.num_routed_experts}: every device must hold the same number of experts"
            )
        return self

    def num_parameters(self, hidden_size: int) -> int:
        """Router, routed and shared experts."""
        return self._parameters(hidden_size, self.num_routed_experts)

    def num_active_parameters(self, hidden_size: int) -> int:
        """What one token passes through: the whole router, k routed experts and the shared ones."""
        return self._parameters(hidden_size, self.experts_per_token)

    def _parameters(self, hidden_size: int, routed: int) -> int:
        router: int = self.router.num_parameters(hidden_size, self.num_routed_experts)
        return router + 3 * hidden_size * self.expert_hidden_size * (routed + self.num_shared_experts)


class MoELayer(nn.Module):
    """A feed-forward layer of many experts. Shared experts are one SwiGLU of their summed width: the same function."""

    def __init__(self, config: MoEConfig, hidden_size: int, vocab_size: int, kernel: ExpertKernel) -> None:
        super().__init__()
        self.config = config
        router: Any = ROUTERS[config.router.kind][1]
        num_experts = config.num_routed_experts
        self.router = router(config.router, hidden_size, num_experts, config.experts_per_token, vocab_size)
        self.experts = GroupedExperts(num_experts, hidden_size, config.expert_hidden_size, kernel)
        shared_width = config.num_shared_experts * config.expert_hidden_size
        self.shared_experts = SwiGLU(hidden_size, shared_width) if shared_width else None

    def forward(
        self, hidden: Tensor, tokens: Tensor, *, constraint: RoutingConstraint | None, record: bool
    ) -> tuple[Tensor, RoutingRecord]:
        """`hidden [batch, seq, hidden]`, `tokens [batch, seq]`; the same shape out, and what happened.

        `record`: keep the whole RoutingDecision in the record.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        decision = self.router(flat, tokens.reshape(-1), constraint)
        gates, keep = decision.gate_weights, None
        load = torch.bincount(decision.expert_ids.reshape(-1), minlength=self.config.num_routed_experts)
        dropped = torch.zeros((), dtype=torch.int64, device=flat.device)
        if self.training and self.config.capacity_factor is not None:
            keep = kept_assignments(decision.expert_ids, len(load), self.config.capacity_factor)
            gates, dropped = gates * keep, (~keep).sum()
        rows, counts, ticket = dispatch(flat, decision, keep)
        output = combine(self.experts(rows, counts), ticket, gates).view_as(hidden)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden)
        balance = balance_terms(self.config.balance, decision, num_sequences=hidden.shape[0])
        return output, RoutingRecord(load, dropped, balance, decision if record else None)
