"""RMSNorm on the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`states [..., size]` divided by the root of their mean square, times `weight [size]`."""
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        flat: Tensor = _RMSNorm.apply(_rows(states), weight, eps)
        return flat.view(states.shape)
    output = states.new_empty(states.shape)
    flat = states if states.is_contiguous() else _rows(states)
    torch.ops.finemoe.rms_norm_forward(flat, weight, eps, output, None)
    return output


def _rows(states: Tensor) -> Tensor:
    """[rows, size]; rows may lie apart, as those of a slice do."""
    flat = states.reshape(-1, states.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, inverse = states.new_empty(states.shape), states.new_empty(len(states))
        torch.ops.finemoe.rms_norm_forward(states, weight, eps, output, inverse)
        ctx.save_for_backward(states, weight, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        states, weight, inverse = ctx.saved_tensors
        grad_states, grad_weight = states.new_empty(states.shape), torch.empty_like(weight)
        torch.ops.finemoe.rms_norm_backward(_rows(grad), states, weight, inverse, grad_states, grad_weight)
        return grad_states, grad_weight, None
