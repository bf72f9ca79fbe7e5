"""attend(query, key, value, mask, scale): one function, several implementations, one table.

`reference` is the oracle, written as in the textbook; `sdpa` is PyTorch's fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""(query [batch, heads, seq, head_dim], key [batch, kv_heads, keys, head_dim], value [batch, kv_heads, keys,
value_dim], mask, scale) -> [batch, heads, seq, value_dim].

mask: bool, broadcastable to [batch, heads, seq, keys], True = may attend. None = causal, seq == keys.
scale: multiplies q kᵀ before the softmax."""


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, in float32, every score in memory."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


def _repeat(states: Tensor, num_heads: int) -> Tensor:
    """Each key-value head once per query head that shares it."""
    repeats = num_heads // states.shape[1]
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


ATTENTION_KERNELS: dict[str, Attend] = {"reference": reference, "sdpa": sdpa}
