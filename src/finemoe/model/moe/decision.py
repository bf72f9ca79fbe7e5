"""What a router decides, what constrains it, and what leaves the layer. Plain values: nothing is kept in modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """Which experts each token goes to, and with what weight."""

    expert_ids: Tensor
    """[tokens, k] int64, distinct within a row, best first."""
    gate_weights: Tensor
    """[tokens, k], multiply the experts' outputs."""
    scores: Tensor
    """[tokens, experts] float32: the score of every expert, before selection."""
    logits: Tensor | None
    """[tokens, experts] float32 before the score function; None for a router that learns nothing."""

    def load(self) -> Tensor:
        """[experts] int64: assignments each expert was chosen for, whatever capacity then makes of them."""
        chosen = self.expert_ids.reshape(-1)
        # Not bincount, which on an accelerator waits for the largest id.
        return chosen.new_zeros(self.scores.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen))


@dataclass(frozen=True)
class RoutingConstraint:
    """One hook for replay, expert knock-out and fewer active experts. A field left at its default does nothing."""

    replay: Tensor | None = None
    """[tokens, k] int64: take these experts; weights still come from the current scores."""
    allowed: Tensor | None = None
    """[experts] or [tokens, experts] bool: the others are never selected. At least k per token must stay allowed."""
    forced: Tensor | None = None
    """[experts] bool: every token goes to these, whatever their scores, which still weigh them; at most k of them."""
    num_active: int | None = None
    """Experts per token instead of the configured number."""
    num_masked: int = 0
    """Leave out, for every token, this many of the experts it would choose first (DeepSeekMoE section 4.5)."""
    routed: bool = True
    """False: the routed experts add nothing to the layer's output; what they would have been chosen for is recorded."""
    shared: bool = True
    """False: the shared experts add nothing."""


@dataclass(frozen=True)
class RoutingRecord:
    """What one MoE layer reports of one forward pass."""

    load: Tensor
    """[experts] int64: assignments each expert was chosen for, before any capacity."""
    dropped: Tensor
    """Scalar int64: assignments beyond capacity; 0 when dropless."""
    balance: Mapping[str, Tensor]
    """Differentiable scalars by name: coefficient times loss, summed over the sequences of the batch; in training."""
    decision: RoutingDecision | None
    """The whole decision, only when asked for."""
    shared_share: Tensor | None = None
    """[tokens] when asked for: length of what the shared experts add, over that and the routed experts' together."""
    unconstrained: Tensor | None = None
    """[tokens, k] int64 when asked for, under replay: what the router would have chosen by itself."""
    expert_ids: Tensor | None = None
    """[tokens, k] int64, best first; None where another process routed."""
    arrived: int | None = None
    """Rows that the experts which lie here took, from all processes; None where they read states in place."""
