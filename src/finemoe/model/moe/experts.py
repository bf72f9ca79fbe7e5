"""The routed experts of one layer: stacked SwiGLU weights, and the kernels that run them over sorted rows.

Every kernel computes, for the rows of expert e, down_e(swiglu(gate_e x, up_e x)). `loop` is the oracle. The native one
also has a fused form, which reads the token states where they are, and weighs and adds what the experts return.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finemoe.model.backend import Backend
from finemoe.model.feed_forward import linear, swiglu
from finemoe.model.moe.dispatch import Ticket
from finemoe.model.quantised.blocks import is_quantised


def loop(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, limit: float | None = None) -> Tensor:
    """One expert after the other, plain autograd.

    `unbind`, not indexing: the gradient of `weight[e]` is a zero tensor of the size of all experts, once per expert;
    the gradient of `unbind` is one stack.
    """
    outputs = []
    weights = zip(rows.split(counts.tolist()), gate_up_proj.unbind(), down_proj.unbind(), strict=True)
    for x, gate_up, down in weights:
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(linear(swiglu(gate, up, limit), down))
    return torch.cat(outputs)


def sorted_slices(
    rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, limit: float | None = None
) -> Tensor:
    """The same products written straight into shared buffers, with a gradient by hand: no per-expert graph nodes."""
    if is_quantised(gate_up_proj) or is_quantised(down_proj):
        return loop(rows, counts, gate_up_proj, down_proj, limit)
    return _SortedSlices.apply(rows, gate_up_proj, down_proj, counts.tolist(), limit)


class _SortedSlices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts: list[int], limit: float | None
    ) -> Tensor:
        gate_up = rows.new_empty(len(rows), gate_up_proj.shape[1])
        for x, weight, out in zip(rows.split(counts), gate_up_proj, gate_up.split(counts), strict=True):
            torch.mm(x, weight.t(), out=out)
        gate, up = gate_up.chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        activated = F.silu(gate).mul_(up)
        output = torch.empty_like(rows)
        for x, weight, out in zip(activated.split(counts), down_proj, output.split(counts), strict=True):
            torch.mm(x, weight.t(), out=out)
        ctx.save_for_backward(rows, gate_up_proj, down_proj, gate_up)
        ctx.counts, ctx.limit = counts, limit
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, gate_up_proj, down_proj, gate_up = ctx.saved_tensors
        counts: list[int] = ctx.counts
        grad = grad.contiguous()
        gate, up = raw_gate, raw_up = gate_up.chunk(2, dim=-1)
        if ctx.limit is not None:
            gate, up = gate.clamp(max=ctx.limit), up.clamp(-ctx.limit, ctx.limit)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activated = silu * up
        grad_down = torch.empty_like(down_proj)
        grad_activated = torch.empty_like(activated)
        slices = zip(grad.split(counts), activated.split(counts), grad_activated.split(counts), strict=True)
        for expert, (g, x, out) in enumerate(slices):
            torch.mm(g, down_proj[expert], out=out)
            torch.mm(g.t(), x, out=grad_down[expert])
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad_activated, silu, out=grad_up)
        # d silu / dx = sigmoid · (1 + x · (1 - sigmoid)); written as 1 + x - silu, a large x would lose the 1
        torch.mul(grad_activated.mul_(up), torch.rsub(sigmoid, 1).mul_(gate).add_(1).mul_(sigmoid), out=grad_gate)
        if ctx.limit is not None:  # a clamped value passes no gradient, nor does NaN, as in torch's clamp
            grad_gate.masked_fill_(~(raw_gate <= ctx.limit), 0)
            grad_up.masked_fill_(~(raw_up.abs() <= ctx.limit), 0)
        grad_gate_up_proj = torch.empty_like(gate_up_proj)
        grad_rows = torch.empty_like(rows)
        slices = zip(grad_gate_up.split(counts), rows.split(counts), grad_rows.split(counts), strict=True)
        for expert, (g, x, out) in enumerate(slices):
            torch.mm(g, gate_up_proj[expert], out=out)
            torch.mm(g.t(), x, out=grad_gate_up_proj[expert])
        return grad_rows, grad_gate_up_proj, grad_down, None, None


def grouped_mm(
    rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, limit: float | None = None
) -> Tensor:
    """PyTorch's grouped products: one launch for all experts, made for bf16 on CUDA; `loop` for what they refuse."""
    if not _grouped_mm_takes(rows, gate_up_proj, down_proj):
        return loop(rows, counts, gate_up_proj, down_proj, limit)
    offsets = counts.cumsum(0).to(rows.device, torch.int32, non_blocking=True)  # counts may lie on the CPU already
    gate_up = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=offsets)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.grouped_mm(swiglu(gate, up, limit), down_proj.transpose(1, 2), offs=offsets)


def _grouped_mm_takes(rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    """Whether this PyTorch has grouped products, and for these: no float64, rows of whole 16 bytes, at least one."""
    sizes = (gate_up_proj.shape[2], down_proj.shape[2])
    return (
        "grouped_mm" in vars(F)
        and not (is_quantised(gate_up_proj) or is_quantised(down_proj))
        and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and len(rows) > 0
        and not any(size * rows.element_size() % 16 for size in sizes)
    )


def run_experts(
    backend: Backend, rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, limit: float | None
) -> Tensor:
    """The backend's kernel at the precision that autocast asks for: a hand-written gradient is out of its sight."""
    return backend.experts(as_multiplied(rows), counts, as_multiplied(gate_up), as_multiplied(down), limit)


def as_multiplied(tensor: Tensor) -> Tensor:
    """In the precision that autocast asks products for; where there is none, `tensor` itself."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class GroupedExperts(nn.Module):
    """All routed experts of a layer as two stacked tensors.

    `gate_up_proj [experts, 2 · width, hidden]` holds gate above up, so that one product serves both;
    `down_proj [experts, hidden, width]`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        expert_hidden_size: int,
        backend: Backend,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_hidden_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_hidden_size))
        self.backend = backend
        self.limit = limit

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`rows [rows, hidden]` sorted by expert, `counts [experts]`; `[rows, hidden]` out, not weighed."""
        return run_experts(self.backend, rows, counts, self.gate_up_proj, self.down_proj, self.limit)

    def fuses(self, hidden: Tensor, gate_weights: Tensor) -> bool:
        """Whether `fused` can take these."""
        whole = self.backend.fused_experts
        return whole is not None and whole.takes(hidden, gate_weights, self.gate_up_proj, self.down_proj)

    def fused(self, hidden: Tensor, ticket: Ticket, gate_weights: Tensor) -> Tensor:
        """Copying out, experts, weighing and adding in one call: `[tokens, hidden]` in and out, gates `[tokens, k]`."""
        whole = self.backend.fused_experts
        assert whole is not None  # as `fuses` says
        index = (ticket.order, ticket.slots, ticket.counts)
        return whole.run(hidden, *index, gate_weights, self.gate_up_proj, self.down_proj, self.limit)
