"""The native experts: a whole layer from token states to token states, and one SwiGLU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def experts(
    states: Tensor,
    order: Tensor | None,
    slots: Tensor | None,
    counts: Tensor,
    gates: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    limit: float | None,
) -> Tensor:
    """Sum over a token's assignments of gate times expert output.

    Args:
        states: [tokens, hidden].
        order: [rows] kept assignments (token · k + choice) sorted by expert; None: row r is token r, all weights 1.
        slots: [tokens · k] the row of each assignment, -1 where dropped; None with `order`.
        counts: [experts] rows of each expert.
        gates: [tokens, k]; None with `order`.
        gate_up_proj: [experts, 2 · width, hidden]; down_proj: [experts, hidden, width]; or blocks of them.
        limit: of the SwiGLU.
    """
    states, gates = states.contiguous(), None if gates is None else gates.contiguous()
    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    width = gate_up_proj.shape[1] // 2
    gate, up = gate_up_proj[:, :width], gate_up_proj[:, width:]
    index = (order, slots, counts)
    bound = math.inf if limit is None else limit
    if not _needs_gradient(states, gates, gate_up_proj, down_proj):
        return _forward(states, index, gates, gate, up, down_proj, bound)[0]
    return _Experts.apply(states, index, gates, gate_up_proj, down_proj, bound)


def swiglu(states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, limit: float | None) -> Tensor:
    """`states [..., hidden]` through one SwiGLU of weights [width, hidden] twice and [hidden, width]."""
    bound = math.inf if limit is None else limit
    flat = states.reshape(-1, states.shape[-1]).contiguous()
    gate_proj, up_proj, down_proj = gate_proj.contiguous(), up_proj.contiguous(), down_proj.contiguous()
    if _needs_gradient(states, gate_proj, up_proj, down_proj):
        output: Tensor = _SwiGLU.apply(flat, gate_proj, up_proj, down_proj, bound)
    else:
        output, _ = _forward(flat, (None, None, None), None, gate_proj[None], up_proj[None], down_proj[None], bound)
    return output.view(states.shape)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


Index = tuple[Tensor | None, Tensor | None, Tensor | None]
"""order, slots, counts"""


def _forward(
    states: Tensor, index: Index, gates: Tensor | None, gate: Tensor, up: Tensor, down: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    rows = len(states) if index[0] is None else len(index[0])
    gate_up, output = states.new_empty(rows, 2 * gate.shape[1]), torch.empty_like(states)
    torch.ops.finemoe.experts_forward(states, *index, gates, gate, up, down, limit, gate_up, output)
    return output, gate_up


class _Experts(torch.autograd.Function):
    """Keeps the states and what leaves the first products; everything else is computed again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, index: Index, gates: Tensor | None, gate_up_proj: Tensor, down: Tensor, limit: float
    ) -> Tensor:
        width = down.shape[2]
        gate, up = gate_up_proj[:, :width], gate_up_proj[:, width:]
        output, gate_up = _forward(states, index, gates, gate, up, down, limit)
        ctx.save_for_backward(gate_up, states, gates, gate_up_proj, down)
        ctx.index, ctx.limit = index, limit
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate_up, states, gates, gate_up_proj, down = ctx.saved_tensors
        width = down.shape[2]
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_gates = torch.zeros_like(gates) if ctx.needs_input_grad[2] else None  # dropped ones stay 0
        grad_gate_up, grad_down = torch.empty_like(gate_up_proj), torch.empty_like(down)
        torch.ops.finemoe.experts_backward(
            *(grad.contiguous(), gate_up, states, *ctx.index, gates),
            *(gate_up_proj[:, :width], gate_up_proj[:, width:], down, ctx.limit),
            *(grad_states, grad_gates, grad_gate_up[:, :width], grad_gate_up[:, width:], grad_down),
        )
        return grad_states, None, grad_gates, grad_gate_up, grad_down, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
        output, gate_up = _forward(states, (None, None, None), None, gate[None], up[None], down[None], limit)
        ctx.save_for_backward(gate_up, states, gate, up, down)
        ctx.limit = limit
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate_up, states, gate, up, down = ctx.saved_tensors
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grads = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(down)
        torch.ops.finemoe.experts_backward(
            *(grad.contiguous(), gate_up, states, None, None, None, None, gate[None], up[None], down[None]),
            *(ctx.limit, grad_states, None, grads[0][None], grads[1][None], grads[2][None]),
        )
        return grad_states, *grads, None
