"""What most methods do to gradients before the update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Clip:
    """Scale all gradients down together when their joint norm is above `max_norm`. Stands first: it trusts the norm."""

    max_norm: float

    def __call__(self, parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        """Gradients below the bound are read once, for the norm, and not written."""
        if norm > self.max_norm:
            gradients = [one.grad for one in parameters.values() if one.grad is not None]
            if all(type(one) is Tensor for one in gradients):
                torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_norm, norm)
            else:  # pieces, perhaps of several meshes, which no operation takes together
                from finemoe.parallel.shard import local  # torch.distributed, which is loaded where there are pieces

                factor = (self.max_norm / (norm + 1e-6)).item()
                with torch.no_grad():
                    for one in gradients:
                        local(one).mul_(factor)
        return {}
