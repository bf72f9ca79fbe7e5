"""The loss on the native products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight · -log p(target): `hidden [tokens, hidden]`, `head_weight [vocab, hidden]`.

    Raises:
        RuntimeError: a target is outside the vocabulary.
    """
    # Decided out here: within a Function's forward, gradients are off and no_grad does not show.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    hidden, head_weight = hidden.contiguous(), head_weight.contiguous()
    loss: Tensor = _CrossEntropy.apply(hidden, head_weight, targets, weights, wants_gradient)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor, wants_gradient: bool
    ) -> Tensor:
        grads = (torch.empty_like(hidden), torch.empty_like(head_weight)) if wants_gradient else (None, None)
        inputs = (hidden, head_weight, targets.contiguous(), weights.contiguous())
        total = torch.ops.finemoe.cross_entropy(*inputs, *grads)
        ctx.save_for_backward(*grads)
        return torch.tensor(total, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None
