"""A few tokens through a whole attention layer and its cache in one native call: reading weights is all it costs."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.model.native import usable

MOST_TOKENS = 8


def decodes(hidden: Tensor, *others: Tensor) -> bool:
    """Whether `hidden [batch, seq, hidden]` and the layer's own tensors may take that way: few tokens, no gradient."""
    few = hidden.shape[0] * hidden.shape[1] <= MOST_TOKENS
    return few and not torch.is_grad_enabled() and usable(hidden, *others)
