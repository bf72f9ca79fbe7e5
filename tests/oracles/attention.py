"""Attention with explicit loops, and rotary positions by complex numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Grouped-query attention as multi-head: each key head stands once for every query head it serves."""
    share = num_heads // states.shape[1]
    return torch.stack([states[:, head // share] for head in range(num_heads)], dim=1)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax_j(q_i . k_j / sqrt(d)) v_j over the j that `mask` shows, key by key."""
    batch, heads, seq, dim = query.shape
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(seq):
                seen = [j for j in range(key.shape[2]) if mask[b, h, i, j]]
                weights = [torch.exp((query[b, h, i] * key[b, h, j]).sum() / math.sqrt(dim)) for j in seen]
                mixed = [w * value[b, h, j] for w, j in zip(weights, seen, strict=True)]
                rows.append(sum(mixed) / sum(weights))
    return torch.stack(rows).view(batch, heads, seq, dim)


def causal(batch: int, heads: int, seq: int) -> Tensor:
    """Query i sees keys 0 to i."""
    return torch.tensor([[j <= i for j in range(seq)] for i in range(seq)]).expand(batch, heads, seq, seq)


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Su et al., equation 13: the pair (i, i + d/2) is a complex number, turned by p * theta^(-2i/d)."""
    half = states.shape[-1] // 2
    pairs = torch.complex(states[..., :half].double(), states[..., half:].double())
    frequency = torch.tensor([theta ** (-2 * i / states.shape[-1]) for i in range(half)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * positions[:, None, :, None] * frequency)
    return torch.cat((turned.real, turned.imag), dim=-1)
