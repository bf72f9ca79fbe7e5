"""Orders that are computed, not stored: a permutation of any size and a fixed schedule of mixture sources.

Both are pure functions of a position, so a run resumes at any position without replaying the ones before, and
both are defined here down to the last bit, so no upgrade of a library changes the order of a run that is
resumed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finemoe.core.seeds import derive

_ROUNDS = 6
_MASK64 = (1 << 64) - 1

IntArray = NDArray[np.int64]


def permuted(indices: IntArray, size: int, seed: int, *names: str | int) -> IntArray:
    """Where a pseudo-random permutation of `range(size)` sends `indices`; every (seed, names) has its own.

    A Feistel network permutes the smallest square power of two that holds `size` [Luby & Rackoff 1988]; an
    image outside the range is sent through again until it falls inside, which keeps the map one to one
    ("cycle walking", Black & Rogaway 2002). Time and memory are those of `indices`, whatever the size.
    """
    half_bits = max(1, -(-max(size - 1, 1).bit_length() // 2))
    keys = [np.uint64((derive(seed, *names, turn) * 2 + 1) & _MASK64) for turn in range(_ROUNDS)]
    result = _feistel(indices.astype(np.uint64), np.uint64(half_bits), keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], np.uint64(half_bits), keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit. Products wrap by design."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class MixtureSchedule:
    """Which source serves each position, so that every stretch of the run holds the sources in proportion.

    One block of `BLOCK` positions, with the sources spread evenly over it, is repeated for ever. Looking up a
    position takes a division and two table reads.
    """

    BLOCK = 10_000

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: one positive number a source, of any sum.

        Raises:
            ValueError: when a source is too rare to get one position in a block.
        """
        shares = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
        self.per_block = _round_to_sum(shares * self.BLOCK, self.BLOCK)
        if (self.per_block == 0).any():
            raise ValueError(f"every weight must be at least 1/{self.BLOCK} of their sum, got {list(weights)}")
        # The k-th turn of a source that has c of them wants to be at (k + 1/2) / c of the block.
        wanted = np.concatenate([(np.arange(count) + 0.5) / count for count in self.per_block])
        sources = np.repeat(np.arange(len(shares)), self.per_block)
        self._source = sources[np.argsort(wanted, kind="stable")]
        self._rank = np.empty(self.BLOCK, dtype=np.int64)
        for source, count in enumerate(self.per_block):
            self._rank[self._source == source] = np.arange(count)

    def at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """For each position: its source, and how many earlier positions that source has served."""
        block, within = np.divmod(positions, self.BLOCK)
        source = self._source[within]
        return source, block * self.per_block[source] + self._rank[within]


def _round_to_sum(values: NDArray[np.float64], total: int) -> IntArray:
    """Whole numbers nearest to `values` that add up to `total` (largest remainders are rounded up)."""
    floor = np.floor(values)
    missing = total - int(floor.sum())
    floor[np.argsort(-(values - floor), kind="stable")[:missing]] += 1
    return floor.astype(np.int64)
