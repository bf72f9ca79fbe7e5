"""Blocks: a cache that many sequences share (Kwon et al., 2023, section 4), as attention reads and writes it.

Every layer keeps its states in blocks of equally many tokens, `[blocks, heads, size, width]`, and a sequence has a
table of the blocks that are its own, in order: its token at position p lies in block `table[p // size]`, at place
`p % size`. Who owns which block is decided elsewhere. A forward pass over such a cache is flat, `[1, tokens]`: the
sequences lie one behind the other, and those that feed equally many tokens make a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from finemoe.model.backend import Backend
from finemoe.model.native import exact
from finemoe.model.quantised.blocks import states_type
from finemoe.model.spans import Spans, up_to_own


@dataclass(frozen=True)
class Group:
    """Sequences of a flat pass that feed equally many tokens, one behind the other."""

    first: int
    """Where in the pass their first token stands."""
    positions: Tensor
    """[sequences, queries] int64: of every token within its sequence."""
    tables: Tensor
    """[sequences, blocks] int64; filled up with any block where a sequence has fewer than others."""
    size: int
    """[tokens] Of a block."""

    @cached_property
    def seen(self) -> Spans:
        """What each token sees: its own sequence up to its own position."""
        return up_to_own(self.positions)

    @property
    def reach(self) -> int:
        """The largest position plus 1."""
        return self.seen.keys

    def of(self, states: Tensor) -> Tensor:
        """The group's part of `states [1, heads, tokens, width]` of the pass: `[sequences, heads, queries, width]`."""
        sequences, queries = self.positions.shape
        part = states[0, :, self.first : self.first + sequences * queries]
        return part.unflatten(1, (sequences, queries)).transpose(0, 1)

    def index(self, heads: int) -> Tensor:
        """`[sequences, reach]` int64: the row of each token in blocks of so many heads, all heads' rows counted.

        Raises:
            IndexError: a position is beyond the sequence's blocks.
        """
        blocks = -(-self.reach // self.size)
        if blocks > self.tables.shape[1]:
            room = self.tables.shape[1] * self.size
            raise IndexError(f"position {self.reach - 1} is beyond its sequence's blocks, which hold {room} tokens")
        places = torch.arange(self.size, device=self.tables.device)
        rows = self.tables[:, :blocks, None] * (heads * self.size) + places
        return rows.flatten(1)[:, : self.reach]


def zeros(shape: tuple[int, ...], beside: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Zeros beside a weight, in the type of its states unless given; on a CPU memory is taken only as it is written."""
    kind = dtype or states_type(beside)
    if beside.device.type != "cpu":
        return beside.new_zeros(shape, dtype=kind)
    memory = np.zeros(math.prod(shape) * kind.itemsize, dtype=np.uint8)  # calloc; torch would write every zero
    return torch.from_numpy(memory).view(kind).view(shape)


def gather(store: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """What a group's sequences have in `store [blocks, heads, size, width]`: `[sequences, heads, reach, width]`."""
    blocks = -(-group.reach // group.size)
    found = exact.bits(store)[group.tables[:, :blocks]].view(store.dtype)
    return found.transpose(1, 2).flatten(2, 3)[:, :, : group.reach].to(dtype)


def put(states: Tensor, group: Group, index: Tensor, store: Tensor) -> None:
    """Write `states [sequences, heads, queries, width]` to their places in `store [blocks, heads, size, width]`."""
    blocks, places = group.tables.gather(1, group.positions // group.size), group.positions % group.size
    exact.store_in_blocks(states, group.positions, index, blocks, places, store)


def attend(
    backend: Backend, query: Tensor, keys: Tensor, values: Tensor, group: Group, index: Tensor, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v over what each sequence has in blocks.

    Args:
        backend: what computes it; the native one reads the blocks where they lie.
        query: [sequences, heads, queries, width].
        keys, values: [blocks, kv_heads, size, width], values as wide or narrower; narrower types are widened here.
        group: whose they are.
        index: of the group, for so many heads of keys.
        scale: multiplies q kᵀ before the softmax.

    Returns `[sequences, heads, queries, value_width]`.
    """
    blocks = backend.blocks
    if blocks is not None and blocks.takes(query, keys, values):
        return blocks.attend(query, keys, values, index, group.seen.last, scale)
    key, value = gather(keys, group, query.dtype), gather(values, group, query.dtype)
    return backend.attend(query, key, value, group.seen, scale)
