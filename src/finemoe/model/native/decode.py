"""A few tokens through a whole attention layer and its cache in one native call: reading weights is all it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finemoe.model.native import usable

MOST_TOKENS = 63


def takes(hidden: Tensor) -> bool:
    """Whether `hidden [batch, seq, hidden]` may take that way: few tokens, no gradient."""
    few = hidden.shape[0] * hidden.shape[1] <= MOST_TOKENS
    return few and not torch.is_grad_enabled() and usable(hidden)


def grouped_query(hidden: Tensor, *layer: Any) -> Tensor:
    """`hidden [batch, seq, hidden]` through grouped-query attention; `layer` in the order of decode.cpp."""
    output = hidden.new_empty(hidden.shape)
    torch.ops.finemoe.decode_grouped_query(hidden.contiguous(), *layer, output)
    return output


def latent(hidden: Tensor, *layer: Any) -> Tensor:
    """`hidden [batch, seq, hidden]` through absorbed latent attention; `layer` in the order of decode.cpp."""
    output = hidden.new_empty(hidden.shape)
    torch.ops.finemoe.decode_latent(hidden.contiguous(), *layer, output)
    return output


def blocks(
    hidden: Tensor,
    count: int,
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
    reals: Sequence[float],
    places: Sequence[Tensor | None],
) -> list[Tensor]:
    """`hidden [batch, seq, hidden]` through `count` whole blocks, in the order in which they use what they are given.

    Returns the same shape, and for each mixture the tokens of each of its experts, `[experts]` int64, and the experts
    of each token, `[tokens, k]` int64; nothing where the weights are not all float32.
    """
    found: list[Tensor] = torch.ops.finemoe.decode_blocks(hidden, count, tensors, integers, reals, places)
    return found
