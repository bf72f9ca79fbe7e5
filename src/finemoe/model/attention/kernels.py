"""attend(query, key, value, mask, scale): one function, several implementations.

`reference` is the oracle, written as in the textbook. `sdpa` keeps no scores: PyTorch's fused kernels. The native
backend has one in C++ for float32 on a CPU, where PyTorch's is only for values as wide as keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.model.spans import Mask, Spans


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, in float32, every score in memory."""
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    full = _in_full(mask)
    if full is None:
        full = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill(~full, -math.inf).softmax(-1) @ value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`."""
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
