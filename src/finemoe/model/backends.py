"""The two backends, plain torch and C++, and the one that a model's kernels ask for.

A native operation takes the C++ path for float32 on a CPU and the plain one for everything else. The plain forms are in
the files of what they belong to; each is the oracle of its native form.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finemoe.model import norm, rope
from finemoe.model.attention.kernels import reference, sdpa
from finemoe.model.backend import Attend, Backend, Blocks, Decode, ExpertKernel, FusedExperts
from finemoe.model.config import Kernels
from finemoe.model.cross_entropy import cross_entropy_sum
from finemoe.model.feed_forward import feed_forward, linear
from finemoe.model.moe.experts import grouped_mm, loop, sorted_slices
from finemoe.model.native import decode, reads, usable
from finemoe.model.native.attention import attention as native_attention
from finemoe.model.native.attention import in_blocks
from finemoe.model.native.cross_entropy import cross_entropy_sum as native_cross_entropy_sum
from finemoe.model.native.experts import experts as native_experts
from finemoe.model.native.experts import swiglu as native_swiglu
from finemoe.model.native.linear import linear as native_linear
from finemoe.model.native.norm import rms_norm as native_rms_norm
from finemoe.model.native.rope import rotate as native_rotate
from finemoe.model.quantised.blocks import in_float32, is_quantised
from finemoe.model.rope import RopeLayout
from finemoe.model.spans import Mask


def _multiplies(states: Tensor, *weights: Tensor) -> bool:
    """Whether C++ can multiply states by these weights. By blocks it cannot where a gradient is to flow back."""
    if not (usable(states) and reads(*weights)):
        return False
    flows = torch.is_grad_enabled() and states.requires_grad
    return not (flows and any(map(is_quantised, weights)))


def native(rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, limit: float | None = None) -> Tensor:
    """The C++ products, on a CPU in float32; `sorted_slices` for anything else."""
    if not _multiplies(rows, gate_up_proj, down_proj):
        return sorted_slices(rows, counts, gate_up_proj, down_proj, limit)
    return native_experts(rows, None, None, counts, None, gate_up_proj, down_proj, limit)


def automatic(
    rows: Tensor, counts: Tensor, gate_up_proj: Tensor, down_proj: Tensor, limit: float | None = None
) -> Tensor:
    """`grouped_mm` for bf16 on CUDA; elsewhere `native`, which falls back by itself."""
    kernel = grouped_mm if rows.device.type == "cuda" and rows.dtype == torch.bfloat16 else native
    return kernel(rows, counts, gate_up_proj, down_proj, limit)


EXPERT_KERNELS: dict[str, ExpertKernel] = {
    "auto": automatic,
    "loop": loop,
    "sorted_slices": sorted_slices,
    "grouped_mm": grouped_mm,
    "native": native,
}
ATTENTION_KERNELS: dict[str, Attend] = {"reference": reference, "sdpa": sdpa}


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _multiplies(states, weight) or (bias is not None and not usable(bias)):
        return linear(states, weight, bias)
    output = native_linear(states, weight)
    return output if bias is None else output + bias


def _rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (native_rms_norm if usable(states, weight) else norm.rms_norm)(states, weight, eps)


def _swiglu(states: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    chosen = native_swiglu if _multiplies(states, gate, up, down) else feed_forward
    return chosen(states, gate, up, down, limit)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor, layout: RopeLayout, *, first: bool = False) -> Tensor:
    if not usable(states, cosine, sine):
        return rope.rotate(states, cosine, sine, layout, first=first)
    return native_rotate(states.transpose(1, 2), cosine, sine, layout == "interleaved", first).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    """C++ skips what spans mask, and has values narrower than keys, for which PyTorch has no fused kernel on a CPU."""
    if isinstance(mask, Tensor) or not usable(query, key, value):
        return sdpa(query, key, value, mask, scale)
    first, last = (None, None) if mask is None else (mask.first, mask.last)
    return native_attention(query, key, value, first, last, scale)


def _plain_cross_entropy_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return cross_entropy_sum(hidden, in_float32(head_weight, hidden.shape[-1]), targets, weights)


def _cross_entropy_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    head_weight = in_float32(head_weight, hidden.shape[-1])
    chosen = native_cross_entropy_sum if usable(hidden, head_weight, weights) else cross_entropy_sum
    return chosen(hidden, head_weight, targets, weights)


def _fuses(hidden: Tensor, gate_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> bool:
    return usable(gate_weights) and _multiplies(hidden, gate_up_proj, down_proj)


_FUSED = FusedExperts(_fuses, native_experts)

TORCH = Backend(
    linear=linear,
    rms_norm=norm.rms_norm,
    swiglu=feed_forward,
    rotate=rope.rotate,
    attend=sdpa,
    experts=sorted_slices,
    cross_entropy_sum=_plain_cross_entropy_sum,
)
"""Plain torch throughout."""
NATIVE = Backend(
    linear=_linear,
    rms_norm=_rms_norm,
    swiglu=_swiglu,
    rotate=_rotate,
    attend=_attend,
    experts=automatic,
    cross_entropy_sum=_cross_entropy_sum,
    decode=Decode(decode.takes, reads, decode.grouped_query, decode.latent, decode.blocks),
    blocks=Blocks(usable, in_blocks),
    fused_experts=_FUSED,
)
"""C++ wherever it can run."""


def backend_for(kernels: Kernels) -> Backend:
    """What `kernels` ask for. Experts are chosen apart from other products: either may be native without the other."""
    chosen = TORCH if kernels.products == "torch" else NATIVE
    if kernels.attention == "reference":  # was asked for to be used
        chosen = replace(chosen, attend=reference, decode=None, blocks=None)
    fused = _FUSED if kernels.experts in ("auto", "native") else None
    return replace(chosen, experts=EXPERT_KERNELS[kernels.experts], fused_experts=fused)


def all_native(kernels: Kernels, *weights: Tensor) -> bool:
    """Whether every product of a model with these weights runs in C++."""
    chosen = kernels.products != "torch" and kernels.attention == "sdpa" and kernels.experts in ("auto", "native")
    return chosen and reads(*weights)
