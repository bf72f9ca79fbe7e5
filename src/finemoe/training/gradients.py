"""What most methods do to gradients before the update, and their norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Scalar: the norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@dataclass(frozen=True)
class Clip:
    """Scale all gradients down together when their joint norm is above `max_norm`. Stands first: it trusts the norm."""

    max_norm: float

    def __call__(self, parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        """Gradients below the bound are read once, for the norm, and not written."""
        if norm > self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_norm, norm)
        return {}
