"""Balance losses. Each takes a decision, its sequences and the layout, and returns the sum over sequences.

The sum, not the mean: the trainer divides by the number of sequences in the whole step, so that accumulating
micro-batches changes nothing. A new loss is a function and a line in BALANCE_TERMS, and a field of BalanceConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from finemoe.core.config import Config
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.sequences import Sequences


class BalanceConfig(Config):
    """Coefficients; 0 switches a term off."""

    expert: NonNegativeFloat = 0.0
    """[coefficient] Expert-level loss, per sequence (DeepSeekMoE eq. 12-14): alpha_1."""
    device: NonNegativeFloat = 0.0
    """[coefficient] Device-level loss, per sequence (DeepSeekMoE eq. 15-17): alpha_2."""
    communication: NonNegativeFloat = 0.0
    """[coefficient] How evenly devices receive tokens, per sequence (V2 section 2.2.3): alpha_3."""
    sequence: NonNegativeFloat = 0.0
    """[coefficient] Sequence-wise loss over normalised, unbiased scores (V3 Eq. 17-20): alpha."""
    z: NonNegativeFloat = 0.0
    """[coefficient] Mean squared logsumexp of the router's logits (ST-MoE)."""
    num_devices: PositiveInt = 1
    """[devices] Groups of consecutive experts that the device-level and communication losses even out."""


@dataclass(frozen=True)
class Layout:
    """How experts lie on devices, and how far a token reaches."""

    num_devices: int
    devices_per_token: int
    """M of V2 Eq. 30."""


def load_and_importance(decision: RoutingDecision, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """f and P of eq. 13-14, each `[sequences, experts]`: f is 1 and P is 1/experts when all is even."""
    return sequences.evenness(decision.expert_ids, decision.scores), sequences.mean(decision.scores)


def expert_balance(decision: RoutingDecision, sequences: Sequences, layout: Layout) -> Tensor:
    """Sum of f_i P_i over the experts (eq. 12): 1 per sequence at perfect balance."""
    f, importance = load_and_importance(decision, sequences)
    return (f * importance).sum()


def device_balance(decision: RoutingDecision, sequences: Sequences, layout: Layout) -> Tensor:
    """Sum of f'_i P'_i over the devices (eq. 15-17): f' is the mean of f, P' the sum of P on a device."""
    f, importance = load_and_importance(decision, sequences)
    grouped = (sequences.count, layout.num_devices, -1)
    return (f.view(grouped).mean(dim=2) * importance.view(grouped).sum(dim=2)).sum()


def communication_balance(decision: RoutingDecision, sequences: Sequences, layout: Layout) -> Tensor:
    """Sum of f''_i P''_i over the devices (V2 Eq. 29-31): f'' counts the tokens that a device receives, once each.

    M is the most devices that one token can reach: its groups, or its experts where nothing limits it.
    """
    devices, per_device = layout.num_devices, decision.scores.shape[1] // layout.num_devices
    sent = decision.scores.new_zeros(decision.scores.shape[0], devices)
    sent.scatter_(1, decision.expert_ids // per_device, 1.0)
    f = sequences.mean(sent) * (devices / layout.devices_per_token)
    importance = sequences.mean(decision.scores.reshape(-1, devices, per_device).sum(dim=2))
    return (f * importance).sum()


def sequence_balance(decision: RoutingDecision, sequences: Sequences, layout: Layout) -> Tensor:
    """Sum of f_i P_i with scores normalised per token, and f of the choice without the bias (V3 Eq. 17-20)."""
    unbiased = decision.scores.detach().topk(decision.expert_ids.shape[1], dim=-1).indices
    normalized = decision.scores / decision.scores.sum(dim=-1, keepdim=True)
    return (sequences.evenness(unbiased, decision.scores) * sequences.mean(normalized)).sum()


def z_loss(decision: RoutingDecision, sequences: Sequences, layout: Layout) -> Tensor:
    """Mean over a sequence's tokens of logsumexp(logits)² (ST-MoE eq. 5)."""
    assert decision.logits is not None  # configuration refuses balance terms for a router without logits
    return sequences.mean(decision.logits.logsumexp(dim=-1).square()).sum()


BALANCE_TERMS: Mapping[str, Callable[[RoutingDecision, Sequences, Layout], Tensor]] = {
    "expert": expert_balance,
    "device": device_balance,
    "communication": communication_balance,
    "sequence": sequence_balance,
    "z": z_loss,
}


def balance_terms(
    config: BalanceConfig, decision: RoutingDecision, sequences: Sequences, layout: Layout
) -> dict[str, Tensor]:
    """Coefficient times loss for every term that is switched on."""
    coefficients = {name: getattr(config, name) for name in BALANCE_TERMS}
    return {
        name: coefficient * BALANCE_TERMS[name](decision, sequences, layout)
        for name, coefficient in coefficients.items()
        if coefficient
    }


def max_violation(load: Tensor | NDArray[Any]) -> float:
    """MaxVio of one layer (2408.15664): (max load - mean load) / mean load; 0 when all is even, or nothing routed."""
    counts = torch.as_tensor(load)
    mean = counts.double().mean().item()
    return (counts.max().item() - mean) / mean if mean else 0.0
