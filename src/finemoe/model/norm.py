"""RMSNorm, computed in float32 whatever the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finemoe.model.native import Native, usable
from finemoe.model.native.norm import rms_norm


class RMSNorm(Native, nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden [..., size]`; same shape and dtype out."""
        if self.native and usable(hidden, self.weight):
            return rms_norm(hidden, self.weight, self.eps)
        # fp32 statistics: a mean of squares in bf16 loses three digits.
        normed = F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden.dtype)
