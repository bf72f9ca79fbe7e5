"""Next-token cross-entropy in chunks, so that [tokens, vocab] is never whole in memory.

The gradient is computed in the forward pass, chunk by chunk, while a chunk's logits are still in cache (the idea of
Liger's fused linear cross-entropy): the backward pass only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = {"cpu": 1 << 19}
"""Logits a chunk holds, by device: 2 MiB in float32 on a CPU, which stays within a core's cache."""
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
"""On an accelerator: 256 MiB, enough to fill it."""


def cross_entropy_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight · -log p(target), in float32, or in float64 where `hidden` is.

    Args:
        hidden: [tokens, hidden].
        head_weight: [vocab, hidden].
        targets: [tokens] int64.
        weights: [tokens] float; 0 leaves a token out.
    """
    # Decided out here: within a Function's forward, gradients are off and no_grad does not show.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head_weight, targets, weights, wants_gradient)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor, wants_gradient: bool
    ) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, cast_weight = hidden.to(dtype), head_weight.to(dtype)
        else:
            cast_weight = head_weight
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        # Accumulated in float32: hundreds of small chunks in bf16 would lose the smallest contributions.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(head_weight, dtype=wide) if wants_gradient else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        chunk = max(1, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_ELSEWHERE) // head_weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                logits = (hidden[part] @ cast_weight.t()).to(wide)
                total += _chunk_loss(logits, targets[part], weights[part])
                if grad_hidden is not None and grad_weight is not None:
                    _chunk_gradient(logits, targets[part], weights[part])
                    scores = logits.to(hidden.dtype)
                    torch.mm(scores, cast_weight, out=grad_hidden[part])
                    if hidden.dtype == wide:
                        grad_weight.addmm_(scores.t(), hidden[part])
                    else:
                        grad_weight += scores.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = head_weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None, None


def _chunk_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Loss of one chunk; leaves the softmax in `logits`."""
    logits -= logits.amax(dim=-1, keepdim=True)
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    logits.exp_()
    norm = logits.sum(dim=-1, keepdim=True)
    logits /= norm
    return (weights * (norm.squeeze(1).log() - chosen)).sum()


def _chunk_gradient(probabilities: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Turn the softmax, in place, into the gradient by the logits: weight · (p - onehot)."""
    ones = torch.ones_like(targets, dtype=probabilities.dtype)
    probabilities.scatter_add_(1, targets[:, None], -ones[:, None])
    probabilities *= weights[:, None]
