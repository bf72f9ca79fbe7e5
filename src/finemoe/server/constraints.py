"""What holds for the experts of one request: some switched off, some forced, fewer of them, none of the shared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemoe.core.errors import ConfigError
from finemoe.generation.sequence import Constraint
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.layer import MoELayer
from finemoe.model.transformer import Transformer


@dataclass(frozen=True)
class Wish:
    """In the words of somebody who wants to see what experts do."""

    disabled: Mapping[int, Collection[int]] = field(default_factory=dict)
    """By layer: experts that are never chosen."""
    forced: Mapping[int, Collection[int]] = field(default_factory=dict)
    """By layer: experts that every token goes to, weighed by their own scores."""
    active: int | None = None
    """Routed experts of a token, in every layer; None: the model's own number."""
    shared: bool = True
    """False: the shared experts add nothing."""
    routed: bool = True
    """False: the routed experts add nothing."""


def constrain(model: Transformer, wish: Wish) -> Constraint | None:
    """`wish` for the layers of `model`; None where it changes nothing.

    Raises:
        ConfigError: layers or experts that the model has not, or too few left to choose from.
    """
    if wish == Wish():
        return None
    layers = {number: layer for number, layer in model.moe_layers.items() if number < len(model.blocks)}
    if not layers:
        raise ConfigError("the model is dense: it has no experts to choose from")
    for table in (wish.disabled, wish.forced):
        _check(table, layers)
    return {number: _of(number, layer, wish) for number, layer in layers.items()}


def _check(table: Mapping[int, Collection[int]], layers: Mapping[int, MoELayer]) -> None:
    for number, experts in table.items():
        if number not in layers:
            raise ConfigError(f"layer {number} has no experts; those that have: {', '.join(map(str, layers))}")
        count = layers[number].config.num_routed_experts
        beyond = next((expert for expert in experts if not 0 <= expert < count), None)
        if beyond is not None:
            raise ConfigError(f"layer {number} has experts 0 to {count - 1}, not {beyond}")


def _of(number: int, layer: MoELayer, wish: Wish) -> RoutingConstraint:
    config = layer.config
    disabled, forced = set(wish.disabled.get(number, ())), set(wish.forced.get(number, ()))
    active = config.experts_per_token if wish.active is None else wish.active
    left = config.num_routed_experts - len(disabled)
    if disabled & forced:
        raise ConfigError(f"layer {number}: expert {min(disabled & forced)} is disabled and forced: choose one of them")
    if not 0 < active <= left:
        raise ConfigError(f"layer {number} has {left} experts left, and a token would go to {active}")
    if len(forced) > active:
        raise ConfigError(f"layer {number}: {len(forced)} experts are forced, and a token goes to {active}")
    if (disabled or forced or wish.active is not None) and not config.router.learned:
        raise ConfigError(f"layer {number}: router {config.router.kind!r} looks its experts up: none can be chosen")
    device = layer.experts.down_proj.device
    return RoutingConstraint(
        allowed=_mask(config.num_routed_experts, disabled, device).logical_not() if disabled else None,
        forced=_mask(config.num_routed_experts, forced, device) if forced else None,
        num_active=wish.active,
        routed=wish.routed,
        shared=wish.shared,
    )


def _mask(count: int, experts: set[int], device: torch.device) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    mask[sorted(experts)] = True
    return mask
