"""The MoE layer, top to bottom: route, dispatch, run experts, combine, add the shared experts (DeepSeekMoE eq. 9)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from finemoe.core.config import Config
from finemoe.model.backend import Backend
from finemoe.model.feed_forward import SwiGLU
from finemoe.model.moe.balance import BALANCE_TERMS, BalanceConfig, Layout, balance_terms
from finemoe.model.moe.capacity import exempt_sequences, kept_assignments, kept_on_devices
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision, RoutingRecord
from finemoe.model.moe.dispatch import Dispatch, LocalDispatch
from finemoe.model.moe.experts import GroupedExperts
from finemoe.model.moe.routers import ROUTERS, RouterConfig
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.model.projection import Projection
from finemoe.model.sequences import Sequences


class MoEConfig(Config):
    """Routed experts, shared experts, and the router between them."""

    kind: Literal["moe"] = "moe"
    num_routed_experts: PositiveInt
    """[experts] Experts that a router chooses from."""
    experts_per_token: PositiveInt
    """[experts] Routed experts that each token goes through: the k of top-k."""
    expert_hidden_size: PositiveInt
    """[components] Intermediate width of every expert, routed or shared."""
    num_shared_experts: NonNegativeInt = 0
    """[experts] Experts that every token goes through, beside the routed ones."""
    gate_shared_experts: bool = False
    """Weigh the shared experts by sigmoid(w · x) (Qwen2-MoE); DeepSeek's always count in full."""
    swiglu_limit: PositiveFloat | None = None
    """[activation] Clamp inside every expert, as in `dense`."""
    router: RouterConfig
    """What decides which experts a token takes."""
    balance: BalanceConfig = BalanceConfig()
    """Losses that keep experts evenly loaded."""
    capacity_factor: PositiveFloat | None = None
    """[times] None: dropless. Else, in training mode only, an expert takes at most this times its even share of a
    micro-batch.

    What a token loses then depends on its neighbours, later ones included (a second choice yields to their first), and
    on how the step is cut into micro-batches. Evaluation drops nothing, as in DeepSeek-V2 section 2.2."""
    capacity_level: Literal["expert", "device"] = "expert"
    """device: each of `balance.num_devices` groups of experts has a budget and drops its lowest gates (V2 2.2.4)."""
    capacity_exempt: Annotated[float, Field(ge=0, le=1)] = 0.0
    """[share] Share of sequences whose tokens are never dropped; 0.1 in V2. Which ones follows from their tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_routed_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is above num_routed_experts {self.num_routed_experts}: "
                "a token cannot choose more experts than there are"
            )
        if isinstance(self.router, GroupsConfig):
            self.router.check_experts(self.num_routed_experts, self.experts_per_token)
        balance = self.balance
        active = [name for name in BALANCE_TERMS if getattr(balance, name)]
        if not self.router.learned and active:
            raise ValueError(f"router {self.router.kind!r} learns nothing, so balance losses must be 0")
        wrong = {"expert", "device", "communication"} & set(active)
        if not self.router.scores_sum_to_one and wrong:
            raise ValueError(
                f"balance.{min(wrong)} needs scores that sum to 1, and those of router {self.router.kind!r} do not: "
                f"set balance.{min(wrong)} = 0, and use balance.sequence"
            )
        self._check_devices()
        if self.gate_shared_experts and not self.num_shared_experts:
            raise ValueError("gate_shared_experts is set, and num_shared_experts is 0: there is nothing to gate")
        if self.num_routed_experts % balance.num_devices:
            raise ValueError(
                f"balance.num_devices {balance.num_devices} does not divide num_routed_experts "
                f"{self.num_routed_experts}: every device must hold the same number of experts"
            )
        return self

    def _check_devices(self) -> None:
        """Nothing is accepted that would have no effect."""
        if self.capacity_factor is None and (self.capacity_exempt or self.capacity_level == "device"):
            raise ValueError(
                "capacity_level and capacity_exempt do nothing without a capacity_factor: set it, V2 has 1.0"
            )
        wanting = {
            "balance.device": self.balance.device,
            "balance.communication": self.balance.communication,
            'capacity_level = "device"': self.capacity_level == "device",
        }
        active = [name for name, value in wanting.items() if value]
        if active and self.balance.num_devices == 1:
            raise ValueError(f"{active[0]} needs balance.num_devices above 1: a single device is always even")

    def without_training(self) -> Self:
        """As it computes in use: balance losses and capacities concern training alone."""
        idle = {"balance": BalanceConfig(), "capacity_factor": None, "capacity_level": "expert", "capacity_exempt": 0.0}
        return self.model_copy(update=idle)

    @property
    def layout(self) -> Layout:
        """How the experts lie on devices; a router's groups are devices."""
        devices = self.balance.num_devices
        reach = min(self.experts_per_token, devices)
        if isinstance(self.router, GroupsConfig) and self.router.num_groups == devices:
            reach = min(reach, self.router.groups_per_token)
        return Layout(devices, reach)

    def num_parameters(self, hidden_size: int) -> int:
        """Router, routed and shared experts."""
        return self._parameters(hidden_size, self.num_routed_experts)

    def num_active_parameters(self, hidden_size: int) -> int:
        """What one token passes through: the whole router, k routed experts and the shared ones."""
        return self._parameters(hidden_size, self.experts_per_token)

    def _parameters(self, hidden_size: int, routed: int) -> int:
        router: int = self.router.num_parameters(hidden_size, self.num_routed_experts)
        gate = hidden_size if self.gate_shared_experts else 0
        return router + gate + 3 * hidden_size * self.expert_hidden_size * (routed + self.num_shared_experts)


def routed_output(
    dispatch: Dispatch,
    experts: GroupedExperts,
    hidden: Tensor,
    decision: RoutingDecision,
    keep: Tensor | None,
    gate_weights: Tensor,
) -> tuple[Tensor, int | None]:
    """Dispatch, experts, combine: `[tokens, hidden]` in and out, and how many rows the experts took.

    All at once where the kernel can and no row has to travel: nothing is copied then, and there is no such number.
    """
    if experts.fuses(hidden, gate_weights):
        ticket = dispatch.in_place(decision, keep)
        if ticket is not None:
            return experts.fused(hidden, ticket, gate_weights), None
    rows, counts, ticket = dispatch.dispatch(hidden, decision, keep)
    return dispatch.combine(experts(rows, counts), ticket, gate_weights), len(rows)


def _share(shared: Tensor, routed: Tensor) -> Tensor:
    """[tokens]: how much of both lengths is that of `shared [batch, seq, hidden]`."""
    lengths = [states.detach().flatten(0, 1).float().norm(dim=-1) for states in (shared, routed)]
    return lengths[0] / (lengths[0] + lengths[1]).clamp(min=torch.finfo(torch.float32).tiny)


class MoELayer(nn.Module):
    """A feed-forward layer of many experts. Shared experts are one SwiGLU of their summed width: the same function.

    `dispatch` may be exchanged for one that reaches experts elsewhere; `experts` then holds those that are here.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, vocab_size: int, backend: Backend) -> None:
        super().__init__()
        self.config = config
        router: Any = ROUTERS[config.router.kind][1]
        num_experts = config.num_routed_experts
        self.router = router(config.router, hidden_size, num_experts, config.experts_per_token, vocab_size)
        width, limit = config.expert_hidden_size, config.swiglu_limit
        self.dispatch: Dispatch = LocalDispatch()
        self.experts = GroupedExperts(num_experts, hidden_size, width, backend, limit)
        shared = config.num_shared_experts
        self.shared_experts = SwiGLU(hidden_size, shared * width, backend, limit) if shared else None
        self.shared_gate = Projection(hidden_size, 1, backend) if config.gate_shared_experts else None

    def parts(self) -> tuple[Any, ...] | None:
        """All that the layer computes with, for one call in eval mode; None where it must go operation by operation."""
        router = self.router.parts()
        if router is None or self.training or self.experts.backend.fused_experts is None:
            return None
        if not isinstance(self.dispatch, LocalDispatch):
            return None
        experts = (self.experts.gate_up_proj, self.experts.down_proj)
        limit = math.inf if self.experts.limit is None else self.experts.limit
        if self.shared_experts is None:
            return (*router, *experts, limit, False)
        gate = None if self.shared_gate is None else self.shared_gate.weight
        return (*router, *experts, limit, True, *self.shared_experts.parts(), gate)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        constraint: RoutingConstraint | None,
        record: bool,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, RoutingRecord]:
        """`hidden [batch, seq, hidden]`, `tokens [batch, seq]`; the same shape out, and what happened.

        `record`: keep the whole RoutingDecision in the record. `sequences`: what balance is of; None: the rows.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        decision = self.router(flat, tokens.reshape(-1), constraint)
        gates, dropped = decision.gate_weights, torch.zeros((), dtype=torch.int64, device=flat.device)
        keep = self._kept(decision, tokens)
        if keep is not None:
            gates, dropped = gates * keep, (~keep).sum()
        constraint = constraint or RoutingConstraint()
        own = None
        if record and constraint.replay is not None:
            with torch.no_grad():
                own = self.router(flat, tokens.reshape(-1), replace(constraint, replay=None)).expert_ids
        output, arrived = torch.zeros_like(hidden), None
        if constraint.routed:
            routed, arrived = routed_output(self.dispatch, self.experts, flat, decision, keep, gates)
            output = routed.view_as(hidden)
        share = None
        if self.shared_experts is not None and constraint.shared:
            shared = self.shared_experts(hidden)
            shared = shared if self.shared_gate is None else F.sigmoid(self.shared_gate(hidden)) * shared
            share = _share(shared, output) if record else None
            output = output + shared
        balance = {}
        if self.training:
            sequences = sequences or Sequences(hidden.shape[0])
            balance = balance_terms(self.config.balance, decision, sequences, self.config.layout)
        whole = decision if record else None
        chosen = decision.expert_ids
        return output, RoutingRecord(decision.load(), dropped, balance, whole, share, own, chosen, arrived)

    def _kept(self, decision: RoutingDecision, tokens: Tensor) -> Tensor | None:
        """[tokens, k] bool: assignments within capacity; None where nothing is dropped."""
        config = self.config
        if not self.training or config.capacity_factor is None:
            return None
        exempt = exempt_sequences(tokens, config.capacity_exempt).expand_as(tokens).reshape(-1)
        if config.capacity_level == "device":
            devices = config.balance.num_devices
            return kept_on_devices(decision, config.num_routed_experts, devices, config.capacity_factor, exempt)
        return kept_assignments(decision.expert_ids, config.num_routed_experts, config.capacity_factor, exempt)
