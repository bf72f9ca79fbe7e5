"""Which tokens of a forward pass belong together, here and elsewhere: what balance is counted over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """Where the rest of sequences is whose tokens lie in several places.

    Pieces follow each other and are equally long; this one is number `piece` of `pieces`.
    """

    @property
    def piece(self) -> int:
        """From 0."""
        ...

    @property
    def pieces(self) -> int:
        """How many there are."""
        ...

    def gather(self, states: Tensor) -> Tensor:
        """`[batch, seq, ...]` here, `[batch, seq · pieces, ...]` out: all pieces in order.

        Its gradient is the sum of those of all places.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Over all pieces, and so its gradient."""
        ...


@dataclass(frozen=True)
class Sequences:
    """The sequences of a pass, whose tokens are laid out one row after the other."""

    count: int
    of: Tensor | None = None
    """[tokens] int64: the sequence of each, 0 to count - 1, none of them empty. None: they follow each other and are
    equally long."""
    across: Context | None = None
    """Here lie pieces of sequences that follow each other, and the rest of each elsewhere."""

    @staticmethod
    def documents(of: Tensor) -> Sequences:
        """One a document of the only row `of [1, tokens]`, where documents are numbered in order."""
        return Sequences(int(of[0, -1]) + 1, of[0])

    @cached_property
    def _lengths(self) -> Tensor:
        assert self.of is not None
        return torch.bincount(self.of, minlength=self.count)

    def mean(self, values: Tensor) -> Tensor:
        """`[count, ...]`: the mean over each sequence of `values [tokens, ...]`."""
        rest = values.shape[1:]
        if self.of is None:
            means = values.reshape(self.count, -1, *rest).mean(dim=1)
            return means if self.across is None else self.across.sum(means) / self.across.pieces
        sums = values.new_zeros(self.count, *rest).index_add(0, self.of, values)
        return sums / self._lengths.view(-1, *(1 for _ in rest))

    def evenness(self, chosen: Tensor, like: Tensor) -> Tensor:
        """`[count, bins]`: how often each bin stands in `chosen [tokens, k]`, over its even share.

        As many bins as `like [tokens, bins]` has, and in its type.
        """
        bins, k = like.shape[1], chosen.shape[1]
        selected = like.new_zeros(self.count, bins)
        if self.of is None:
            rows = chosen.reshape(self.count, -1)
            selected.scatter_add_(1, rows, torch.ones_like(rows, dtype=selected.dtype))
            if self.across is not None:
                selected = self.across.sum(selected) / self.across.pieces
            return selected * (bins / rows.shape[1])
        places = (self.of[:, None] * bins + chosen).reshape(-1)
        selected.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=selected.dtype))
        return selected * (bins / (k * self._lengths.to(selected.dtype)))[:, None]

    def cut(self, keep: Tensor) -> Sequences:
        """The same without the tokens where `keep [tokens]` is False; a sequence that loses all of them is gone."""
        assert self.of is not None
        kept = self.of[keep]
        numbers = torch.unique_consecutive(kept, return_inverse=True)[1]
        return Sequences(int(numbers[-1]) + 1 if len(numbers) else 0, numbers)
