"""Context parallelism: each process computes a piece of every sequence, and what others need of it travels.

For latent attention that is the latent and the rotary key of every token, 576 numbers in DeepSeek-V3, where keys and
values of all heads would be 40,960: so they are gathered whole, and every process attends with its own queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Pieces side by side along dimension 1; a piece's gradient is the sum of what all places found.

    Gradients in bf16 are summed in float32 and rounded once: every place would add an error of its own.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(states) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, states.contiguous(), group=group)
        return torch.cat(pieces, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        pieces = [piece.contiguous() for piece in wide.chunk(dist.get_world_size(ctx.group), dim=1)]
        mine = torch.empty_like(pieces[0])
        dist.reduce_scatter(mine, pieces, group=ctx.group)
        return mine.to(grad.dtype), None


class _Sum(torch.autograd.Function):
    """The sum of all places, and so its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass(frozen=True)
class Pieces:
    """`model.sequences.Context` over a process group."""

    group: Any
    piece: int
    pieces: int

    def gather(self, states: Tensor) -> Tensor:
        """All pieces, in the order of ranks."""
        gathered: Tensor = _Gather.apply(states, self.group)
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks of the group."""
        total: Tensor = _Sum.apply(values, self.group)
        return total
