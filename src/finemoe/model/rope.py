"""Rotary position embedding, half-split layout: component i is paired with i + head_dim / 2 (Su et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions [batch, seq]`, each `[batch, seq, head_dim / 2]` in float32."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate `states [batch, heads, seq, head_dim]` by angles `[batch, seq, head_dim / 2]`."""
    cosine, sine = cosine[:, None].to(states.dtype), sine[:, None].to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
