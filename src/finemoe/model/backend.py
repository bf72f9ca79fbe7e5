"""Backend: the operations that a model is computed with. Chosen once, from its kernels, and held by every module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from finemoe.model.rope import RopeLayout
from finemoe.model.spans import Mask


class Attend(Protocol):
    """Attention itself, without projections."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v: `[batch, heads, seq, value_dim]`.

        Args:
            query: [batch, heads, seq, head_dim].
            key: [batch, kv_heads, keys, head_dim].
            value: [batch, kv_heads, keys, value_dim].
            mask: what each query sees.
            scale: multiplies q kᵀ before the softmax.
        """


class Rotate(Protocol):
    """Rotary positions."""

    def __call__(
        self, states: Tensor, cosine: Tensor, sine: Tensor, layout: RopeLayout, *, first: bool = False
    ) -> Tensor:
        """`states [batch, heads, seq, dim]` turned by angles `[batch, seq, pairs]`, as in `model.rope.rotate`."""


ExpertKernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]
"""(rows [rows, hidden] sorted by expert, counts [experts], gate_up_proj, down_proj, SwiGLU limit) -> [rows, hidden]."""


@dataclass(frozen=True)
class Decode:
    """A few tokens through a whole attention layer and its cache in one call."""

    takes: Callable[..., bool]
    """Whether it can take `hidden [batch, seq, hidden]`: few tokens, and no gradient."""
    reads: Callable[..., bool]
    """Whether it can compute with these tensors of a layer."""
    grouped_query: Callable[..., Tensor]
    latent: Callable[..., Tensor]
    """(hidden, what the layer holds, where the tokens stand) -> [batch, seq, hidden], in the order of the C++ call."""
    blocks: Callable[..., list[Tensor]]
    """(hidden, so many blocks, the tensors, integers and reals that they use in that order, where tokens stand) ->
    [batch, seq, hidden], and how many tokens went to each expert of each mixture; nothing where it cannot take the
    weights."""


@dataclass(frozen=True)
class Blocks:
    """Attention over keys and values where they lie, in blocks that many sequences share."""

    takes: Callable[..., bool]
    """Whether it can take queries, keys and values."""
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """(query [sequences, heads, queries, width], keys, values [blocks, kv_heads, size, width], index, last, scale)"""


@dataclass(frozen=True)
class FusedExperts:
    """A whole expert layer in one call: rows copied out, products, weighed and added."""

    takes: Callable[..., bool]
    """Whether it can take token states, gate weights and the experts' weights."""
    run: Callable[..., Tensor]
    """(hidden [tokens, hidden], order, slots, counts, gate_weights [tokens, k], gate_up_proj, down_proj, limit)"""


@dataclass(frozen=True)
class Backend:
    """One function an operation. Whether C++ can take the tensors at hand is decided inside, call by call."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(states [..., in], weight [out, in], bias [out] or None) -> [..., out]"""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(states [..., size], weight [size], eps) -> [..., size]"""
    swiglu: Callable[[Tensor, Tensor, Tensor, Tensor, float | None], Tensor]
    """(states [..., hidden], gate, up and down weights, limit) -> [..., hidden]"""
    rotate: Rotate
    attend: Attend
    experts: ExpertKernel
    cross_entropy_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(hidden [tokens, hidden], head [vocab, hidden], targets and weights [tokens]) -> sum of weight · -log p"""
    decode: Decode | None = None
    """None: attention is always computed operation by operation."""
    blocks: Blocks | None = None
    """None: keys and values are gathered from their blocks and attended as usual."""
    fused_experts: FusedExperts | None = None
    """None: rows are copied out, multiplied, weighed and added by an operation each."""
