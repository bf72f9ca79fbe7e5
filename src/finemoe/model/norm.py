"""RMSNorm, computed in float32 whatever the input, but for float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finemoe.model.backend import Backend


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden [..., size]` divided by the root of its mean square, times `weight [size]`; same shape and dtype out."""
    # fp32 statistics: a mean of squares in bf16 loses three digits.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.rms_norm(hidden.to(wide), weight.shape, weight.to(wide), eps).to(hidden.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.backend = backend

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden [..., size]`; same shape and dtype out."""
        return self.backend.rms_norm(hidden, self.weight, self.eps)
