"""Token streams to batches: the loader has no state, only a position.

A stream is cut into windows of `sequence_length + 1` tokens that overlap by one, so every token but the first
is a target once an epoch. Sequence `i` of epoch `e` is a pure function of (seed, e, i): killing a run and
resuming it at any position, on any number of ranks or micro-batches, gives the batches it would have had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray

from finemoe.core.errors import DataError
from finemoe.data.batch import TokenBatch
from finemoe.data.shuffle import IntArray, MixtureSchedule, permuted

Packing = Literal["concatenate", "isolate"]
TokenArray = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class TokenSource:
    """One stream of tokens, each document ended by the end-of-text id, and its weight in the mixture."""

    name: str
    weight: float
    tokens: TokenArray
    bytes_per_byte: float = 1.0
    """Bytes of its text for each byte that its tokens stand for; other than 1 where the tokenizer changes the text."""

    def num_windows(self, sequence_length: int) -> int:
        """How many windows of `sequence_length + 1` tokens, overlapping by one, fit; the tail is left out."""
        return max(0, len(self.tokens) - 1) // sequence_length

    def windows(self, indices: IntArray, sequence_length: int) -> IntArray:
        """The windows at `indices`: `[len(indices), sequence_length + 1]`."""
        views = np.lib.stride_tricks.sliding_window_view(self.tokens, sequence_length + 1)
        return views[indices * sequence_length].astype(np.int64)


@final
@dataclass(frozen=True)
class TokenShards:
    """The token streams of one side of the split: one source, or one for each part of a mixture."""

    sources: tuple[TokenSource, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all sources, end-of-text tokens included."""
        return sum(len(source.tokens) for source in self.sources)


def pack(windows: IntArray, packing: Packing, end_of_text_id: int) -> TokenBatch:
    """Windows `[batch, seq + 1]` to a batch.

    "concatenate" is the paper's way: a row is one stretch of text and attention crosses its separators.
    "isolate" gives each document its own number and its own positions from 0; a separator belongs to the
    document it ends, and predicting the next document's first token from it carries no weight.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    steps = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if packing == "concatenate":
        documents, positions, weights = np.zeros_like(tokens), steps, np.ones(tokens.shape, np.float32)
    else:
        ends = tokens == end_of_text_id
        starts = np.zeros_like(ends)
        starts[:, 1:] = ends[:, :-1]
        documents = np.cumsum(starts, axis=1, dtype=np.int64)
        positions = steps - np.maximum.accumulate(np.where(starts, steps, 0), axis=1)
        weights = (~ends).astype(np.float32)
    columns = (tokens, targets, weights, positions, documents)
    return TokenBatch(*(torch.from_numpy(np.array(column)) for column in columns))


@final
class Loader:
    """Batches of training sequences by position; see the module for what that guarantees."""

    def __init__(
        self, shards: TokenShards, *, sequence_length: int, packing: Packing, end_of_text_id: int, seed: int
    ) -> None:
        """Serve `shards` in the order that `seed` decides.

        Raises:
            DataError: when a source is shorter than one sequence, or too rare in the mixture.
        """
        self.sequence_length = sequence_length
        self._sources = shards.sources
        self._packing: Packing = packing
        self._end_of_text_id = end_of_text_id
        self._seed = seed
        self._num_windows = np.array([source.num_windows(sequence_length) for source in shards.sources])
        for source, count in zip(shards.sources, self._num_windows, strict=True):
            if count == 0:
                raise DataError(
                    f"corpus {source.name}: {len(source.tokens)} training tokens are fewer than one sequence "
                    f"of {sequence_length} + 1: add text or lower `sequence_length`"
                )
        try:
            self._schedule = MixtureSchedule([source.weight for source in shards.sources])
        except ValueError as error:
            raise DataError(f"mixture: {error}; raise the smallest") from error

    @property
    def sequences_per_epoch(self) -> int:
        """Distinct sequences in all sources. In a mixture each source wraps around on its own."""
        return int(self._num_windows.sum())

    def batch(self, position: int, num_sequences: int) -> TokenBatch:
        """Sequences `position` to `position + num_sequences`, counted from the start of the run."""
        positions = np.arange(position, position + num_sequences)
        source_ids, served = self._schedule.at(positions)
        windows = np.empty((num_sequences, self.sequence_length + 1), dtype=np.int64)
        for source_id in np.unique(source_ids):
            rows = np.flatnonzero(source_ids == source_id)
            indices = self._window_indices(int(source_id), served[rows])
            windows[rows] = self._sources[source_id].windows(indices, self.sequence_length)
        return pack(windows, self._packing, self._end_of_text_id)

    def _window_indices(self, source_id: int, served: IntArray) -> IntArray:
        """The windows a source gives as its `served`-th ones: a new permutation each epoch."""
        size = int(self._num_windows[source_id])
        epochs, within = np.divmod(served, size)
        indices = np.empty_like(served)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            names = ("data", self._sources[source_id].name, int(epoch))
            indices[chosen] = permuted(within[chosen], size, self._seed, *names)
        return indices
