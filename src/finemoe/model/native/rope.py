"""Rotation of queries and keys on the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(states: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, first: bool) -> Tensor:
    """The last, or first, components of `states [batch, seq, heads, dim]` turned by angles `[batch, seq, pairs]`."""
    if torch.is_grad_enabled() and states.requires_grad:
        turned: Tensor = _Rotate.apply(states, cosine, sine, interleaved, first)
        return turned
    return _turned(states, cosine, sine, interleaved, first, False)


def _turned(states: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, first: bool, back: bool) -> Tensor:
    output = states.new_empty(states.shape)
    states = states if states.stride(-1) == 1 else states.contiguous()
    torch.ops.finemoe.rotate(states, cosine, sine, interleaved, first, back, output)
    return output


class _Rotate(torch.autograd.Function):
    """The gradient turns by the negative angles."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, first: bool) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.interleaved, ctx.first = interleaved, first
        return _turned(states, cosine, sine, interleaved, first, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, sine, ctx.interleaved, ctx.first, True), None, None, None, None
