"""Sequences whose tokens are spread over several places: what a layer asks of the other pieces of its sequences."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The pieces follow each other and are equally long; this one is number `piece` of `pieces`."""

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
