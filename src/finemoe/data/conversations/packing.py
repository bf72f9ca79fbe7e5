"""Conversations into batches without padding: as many as fit a sequence length go together, and a batch is one row.

A bin is what a position of the data counts: conversations whose tokens together are at most one sequence length. Which
go together follows from the seed alone; every epoch serves the same bins in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from finemoe.core.errors import DataError
from finemoe.core.logs import logger
from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.data.conversations.store import Stored
from finemoe.data.loader import Packing
from finemoe.data.shuffle import permuted

TooLong = Literal["cut", "drop"]
Weighing = Literal["token", "conversation"]
_OPEN_BINS = 64
"""Bins that are tried for the next conversation: more fill them better and take longer."""

_MUCH_DROPPED = 0.1
"""Share of the items that is not left out without a warning."""
_HELD = 0.99
"""Share of the items that the length which is advised holds."""


@dataclass(frozen=True)
class Fitted:
    """What of the stored items is used, at one sequence length."""

    items: NDArray[np.int64]
    """Their numbers."""
    lengths: NDArray[np.int64]
    """[items, segments]: tokens of each segment that are used; the last one is only predicted."""
    cut: int
    dropped: int

    @property
    def tokens(self) -> NDArray[np.int64]:
        """[items]: tokens that the model reads of each."""
        return (self.lengths - 1).sum(axis=1)


def fit(stored: Stored, sequence_length: int, too_long: TooLong) -> Fitted:
    """What fits: a conversation that is too long is cut behind its last answer that fits, or dropped.

    Of a pair both answers must fit whole: half an answer is no worse or better than another half.
    """
    per_item = stored.segments_per_item
    lengths = np.diff(stored.starts).reshape(-1, per_item)
    fits = (lengths - 1 <= sequence_length).all(axis=1)
    cut = np.zeros(len(stored), dtype=bool)
    if too_long == "cut" and per_item == 1:
        for item in np.flatnonzero(~fits):
            _, trained = stored.segment(int(item))
            ends = np.flatnonzero(trained & ~np.append(trained[1:], False)) + 1
            ends = ends[ends - 1 <= sequence_length]
            if len(ends):
                lengths[item, 0], cut[item] = ends[-1], True
    used = np.flatnonzero(fits | cut)
    return Fitted(used, lengths[used], int(cut.sum()), int((~(fits | cut)).sum()))


def length_for(stored: Stored, share: float) -> int:
    """The smallest sequence length that so large a share of the items fit whole."""
    needed = np.sort((np.diff(stored.starts).reshape(-1, stored.segments_per_item) - 1).max(axis=1))
    return int(needed[math.ceil(share * len(needed)) - 1])


def bins(tokens: NDArray[np.int64], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Numbers of items, taken in `order`, in bins of at most `capacity` tokens: each goes into the first with room."""
    closed: list[list[int]] = []
    opened: list[tuple[int, list[int]]] = []
    for number in order:
        need = int(tokens[number])
        at = next((place for place, (room, _) in enumerate(opened) if room >= need), None)
        if at is None:
            if len(opened) == _OPEN_BINS:
                closed.append(opened.pop(0)[1])
            opened.append((capacity - need, [number]))
        else:
            room, members = opened[at]
            members.append(number)
            opened[at] = (room - need, members)
    return closed + [members for _, members in opened]


@final
@dataclass(frozen=True)
class Packer:
    """Batches by position: a pure function of the seed."""

    stored: Stored
    fitted: Fitted
    sequence_length: int
    seed: int
    weighing: Weighing = "token"
    packing: Packing = "isolate"
    """"concatenate": a token sees the conversations before its own in the bin, as in the papers' runs."""
    together: bool = True
    """False: an item is a position of its own, as pairs are."""
    ending: int | None = None
    """A token that follows every segment, and the only one that is learnt: what a judge says of it."""

    @cached_property
    def bins(self) -> list[list[int]]:
        """Rows of `fitted` that go together."""
        size = len(self.fitted.items)
        if not self.together:
            return [[number] for number in range(size)]
        order = permuted(np.arange(size), size, self.seed, "bins")
        return bins(self.fitted.tokens, self.sequence_length, order.tolist())

    def served(self, positions: int | None) -> list[int]:
        """Rows of `fitted` that so many positions from the start serve, each once; None: all of them."""
        size = len(self.bins)
        if positions is None or positions >= size:
            return list(range(len(self.fitted.items)))
        first = permuted(np.arange(positions), size, self.seed, "order", 0)
        return sorted(number for place in first.tolist() for number in self.bins[place])

    def require(self, num_sequences: int, room: int = 0) -> None:
        """Check that a step does not hold more than all there is; much that was left out as too long is told.

        Args:
            num_sequences: of a step.
            room: tokens of `data.sequence_length` that are kept for something else.

        Raises:
            DataError: it does.
        """
        if not len(self.fitted.items) and self.fitted.dropped:
            raise DataError(
                f"all {self.fitted.dropped} are longer than data.sequence_length {self.sequence_length}: raise it"
            )
        if len(self.bins) < num_sequences:
            each = f"bins of {self.sequence_length} tokens" if self.together else "items"
            raise DataError(
                f"there are {len(self.fitted.items)} items to train on, which make {len(self.bins)} {each}, and one "
                f"step takes {num_sequences}: add more, or lower `training.tokens_per_step`"
                + (f"; {self.fitted.dropped} are longer than data.sequence_length" if self.fitted.dropped else "")
            )
        if self.fitted.dropped >= _MUCH_DROPPED * len(self.stored):
            logger.warning(
                "%s of %s to train on (%.0f%%) are longer than data.sequence_length %d leaves room for, and left out: "
                "data.sequence_length = %d would hold %.0f%% of them",
                f"{self.fitted.dropped:,}",
                f"{len(self.stored):,}",
                100 * self.fitted.dropped / len(self.stored),
                self.sequence_length + room,
                length_for(self.stored, _HELD) + room,
                100 * _HELD,
            )

    def batch(self, position: int, num_sequences: int) -> PackedBatch:
        """Bins `position` to `position + num_sequences`, counted from the start of the run."""
        places = np.arange(position, position + num_sequences)
        epochs, within = np.divmod(places, len(self.bins))
        chosen = [
            self.bins[int(permuted(np.array([place]), len(self.bins), self.seed, "order", int(epoch))[0])]
            for epoch, place in zip(epochs, within, strict=True)
        ]
        return self.pack(chosen)

    def pack(self, groups: Sequence[Sequence[int]]) -> PackedBatch:
        """Rows of `fitted` as one batch, a group a position."""
        per_item = self.stored.segments_per_item
        columns: dict[str, list[NDArray[np.generic]]] = {
            name: [] for name in ("tokens", "targets", "weights", "positions", "documents")
        }
        items, document = [], 0
        for group in groups:
            begun = 0  # of the bin, where its conversations are one text
            for number in group:
                items.append(int(self.fitted.items[number]))
                for segment in range(per_item):
                    ids, weights = self._segment(number, segment)
                    columns["tokens"].append(ids[:-1])
                    columns["targets"].append(ids[1:])
                    columns["weights"].append(weights)
                    columns["positions"].append(np.arange(begun, begun + len(weights)))
                    columns["documents"].append(np.full(len(weights), document))
                    if self.packing == "isolate":
                        document += 1
                    else:
                        begun += len(weights)
            document += self.packing == "concatenate"
        flat = {name: torch.from_numpy(np.concatenate(pieces))[None] for name, pieces in columns.items()}
        return PackedBatch(TokenBatch(**flat), len(groups), document, torch.tensor(items))

    def _segment(self, number: int, segment: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of one segment of an item that is used, and the weight of each but the first."""
        item, per_item = int(self.fitted.items[number]), self.stored.segments_per_item
        ids, trained = self.stored.segment(item * per_item + segment)
        length = int(self.fitted.lengths[number, segment])
        ids, weights = ids[:length], trained[1:length].astype(np.float32)
        if self.ending is not None:
            ids, weights = np.append(ids, self.ending), np.append(np.zeros_like(weights), np.float32(1))
        if self.weighing == "conversation":
            weights /= max(1.0, weights.sum())
        return ids, weights
