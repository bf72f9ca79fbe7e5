"""Places: where the tokens of one forward pass stand, and what its layers share because of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from finemoe.model.attention.blocks import Group
from finemoe.model.native import exact
from finemoe.model.rope import RopeConfig, rotation
from finemoe.model.sequences import Context, Sequences
from finemoe.model.spans import Mask, Spans, up_to_own


class Places:
    """Made anew for every forward pass; what one layer computes here, the others find."""

    def __init__(
        self,
        positions: Tensor,
        mask: Mask = None,
        groups: Sequence[Group] = (),
        sequences: Sequences | None = None,
        context: Context | None = None,
    ) -> None:
        """`positions [batch, seq]` int64; `mask` as in `spans.Mask`, of no effect on cached attention.

        With `groups` the pass is flat, and its cache one of blocks. `sequences`: what balance is of; None: the rows.
        `context`: where the rest of each row is; the mask is then over all of its keys.
        """
        self.context = context
        self.positions = positions
        self.mask = mask
        self.groups = tuple(groups)
        self.sequences = sequences
        self._index: dict[tuple[int, int], Tensor] = {}
        self._rotations: dict[tuple[int, RopeConfig], tuple[Tensor, Tensor]] = {}
        self._known: dict[tuple[int, int], tuple[RopeConfig, tuple[Tensor, Tensor]]] = {}  # by identity

    def rotation(self, dim: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[batch, seq, dim / 2]`."""
        known = self._known.get((dim, id(rope)))
        if known is None:
            key = (dim, rope)
            if key not in self._rotations:
                self._rotations[key] = rotation(self.positions, dim, rope)
            known = self._known[dim, id(rope)] = (rope, self._rotations[key])  # which keeps the identity its own
        return known[1]

    @cached_property
    def queries(self) -> int:
        """How many tokens every sequence of the pass feeds; 0 where they feed different numbers."""
        return 0 if len(self.groups) > 1 else self.own_positions.shape[1]

    @cached_property
    def own_positions(self) -> Tensor:
        """`positions` with a sequence a row; of a flat pass, of its one group."""
        return self.groups[0].positions if self.groups else self.positions

    def apart(self, states: Tensor) -> Tensor:
        """`[batch, seq, ...]` with a sequence a row; of a flat pass, `[1, tokens, ...]` in, with one group."""
        return states.view(*self.groups[0].positions.shape, *states.shape[2:]) if self.groups else states

    def index(self, heads: int, number: int = 0) -> Tensor:
        """`Group.index` of a group of a flat pass, computed once for all layers."""
        key = (heads, number)
        if key not in self._index:
            self._index[key] = self.groups[number].index(heads)
        return self._index[key]

    @cached_property
    def seen(self) -> Spans:
        """What each token sees of a cache: everything up to its own position."""
        return up_to_own(self.positions)

    @property
    def reach(self) -> int:
        """The largest position plus 1: how much of a cache is read."""
        return self.seen.keys

    def cut(self, length: int) -> Places:
        """The same for the first `length` tokens of each row, without a cache."""
        mask = self.mask
        if isinstance(mask, Spans):
            first = None if mask.first is None else mask.first[:, :length]
            mask = Spans(first, mask.last[:, :length], length)
        elif mask is not None:
            mask = mask[..., :length, :length]
        return Places(self.positions[:, :length], mask)


def within_documents(documents: Tensor) -> Spans:
    """Causal attention that stops where a document begins: a run of equal ids in `documents [batch, seq]`."""
    seq = documents.shape[1]
    index = torch.arange(seq, device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins, index, 0).cummax(dim=1).values
    return Spans(first, index + 1, seq)


def piece_of(positions: Tensor, documents: Tensor | None, context: Context) -> Places:
    """A piece of rows that lie in several places; `positions` and `documents [batch, seq]` of what is here."""
    seq = positions.shape[1]
    start, keys = context.piece * seq, seq * context.pieces
    if documents is None:
        index = torch.arange(start, start + seq, device=positions.device).expand_as(positions)
        spans = Spans(None, index + 1, keys)
    else:
        whole = within_documents(context.gather(documents))
        assert whole.first is not None  # as `within_documents` makes it
        spans = Spans(whole.first[:, start : start + seq], whole.last[:, start : start + seq], keys)
    return Places(positions, spans, sequences=Sequences(len(positions), across=context), context=context)


def store(states: Tensor, places: Places, cache: Tensor) -> None:
    """Write `states [batch, heads, seq, width]` into `cache [batch, heads, capacity, width]` at their positions.

    Raises:
        IndexError: a position is beyond the capacity.
    """
    capacity = cache.shape[2]
    if places.reach > capacity:
        raise IndexError(f"position {places.reach - 1} is beyond the cache's capacity of {capacity} tokens")
    exact.store(states, places.positions, cache)
