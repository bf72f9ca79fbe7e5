"""Masks of attention: what each query may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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


def up_to_own(positions: Tensor) -> Spans:
    """What tokens at `positions [batch, seq]` see of a cache: everything up to their own."""
    return Spans(None, positions + 1, int(positions.max()) + 1)


Mask = Tensor | Spans | None
"""A bool tensor that broadcasts to [batch, heads, seq, keys], True = may attend; spans; None = causal, seq == keys."""
