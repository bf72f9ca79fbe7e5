"""attend(query, key, value, mask, scale): one function, several implementations, one table.

`reference` is the oracle, written as in the textbook. `sdpa` keeps no scores: PyTorch's fused kernels, and ours in C++
for float32 on a CPU, where PyTorch has one only for values as wide as keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.model.native import usable
from finemoe.model.native.attention import attention as native_attention


@dataclass(frozen=True)
class Spans:
    """A mask in two numbers a query: it sees keys `first` to `last - 1`."""

    first: Tensor | None
    """[batch, seq] int64; None: from key 0."""
    last: Tensor
    """[batch, seq] int64."""
    keys: int
    """How many there are."""

    @cached_property
    def mask(self) -> Tensor:
        """[batch, 1, seq, keys] bool: the same in full."""
        key = torch.arange(self.keys, device=self.last.device)
        seen = key < self.last[:, None, :, None]
        return seen if self.first is None else seen & (key >= self.first[:, None, :, None])


Mask = Tensor | Spans | None
"""A bool tensor that broadcasts to [batch, heads, seq, keys], True = may attend; spans; None = causal, seq == keys."""


class Attend(Protocol):
    """One kernel."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, *, native: bool = True
    ) -> Tensor:
        """softmax(scale · q kᵀ) v: `[batch, heads, seq, value_dim]`.

        Args:
            query: [batch, heads, seq, head_dim].
            key: [batch, kv_heads, keys, head_dim].
            value: [batch, kv_heads, keys, value_dim].
            mask: what each query sees.
            scale: multiplies q kᵀ before the softmax.
            native: whether C++ may be used where there is some.
        """


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, *, native: bool = True) -> Tensor:
    """softmax(scale · q kᵀ) v, in float32, every score in memory."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    full = _in_full(mask)
    if full is None:
        full = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill(~full, -math.inf).softmax(-1) @ value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, *, native: bool = True) -> Tensor:
    """The C++ kernel, which skips what spans mask; `torch.nn.functional.scaled_dot_product_attention` for the rest."""
    if native and not isinstance(mask, Tensor) and usable(query, key, value):
        first, last = (None, None) if mask is None else (mask.first, mask.last)
        return native_attention(query, key, value, first, last, scale)
    full = _in_full(mask)
    if full is not None and key.shape[1] == 1:
        return _behind_each_other(query, key, value, full, scale)
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=full, is_causal=full is None, scale=scale)


def _in_full(mask: Mask) -> Tensor | None:
    return mask.mask if isinstance(mask, Spans) else mask


def _behind_each_other(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """All heads share one key: they line up as if they were more queries of one head, and keys need no copies."""
    batch, heads, seq, _ = query.shape
    mask = mask.expand(batch, heads, seq, key.shape[2]).reshape(batch, 1, heads * seq, -1)
    query = query.reshape(batch, 1, heads * seq, -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return mixed.view(batch, heads, seq, -1)


def _repeat(states: Tensor, num_heads: int) -> Tensor:
    """Each key-value head once per query head that shares it."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


ATTENTION_KERNELS: dict[str, Attend] = {"reference": reference, "sdpa": sdpa}
