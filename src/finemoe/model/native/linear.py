"""A linear layer on the native products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear(states: Tensor, weight: Tensor) -> Tensor:
    """`states [..., in]` times `weight [out, in]`, or blocks of it, transposed: `[..., out]`."""
    flat, weight = states.reshape(-1, states.shape[-1]).contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        output: Tensor = _Linear.apply(flat, weight)
    else:
        output = flat.new_empty(len(flat), len(weight))
        torch.ops.finemoe.linear_forward(flat, weight, output)
    return output.view(*states.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        output = states.new_empty(len(states), len(weight))
        torch.ops.finemoe.linear_forward(states, weight, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        states, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = torch.empty_like(states)
            torch.ops.finemoe.linear_grad_input(grad, weight, grad_states)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            torch.ops.finemoe.linear_grad_weight(grad, states, grad_weight)
        return grad_states, grad_weight
