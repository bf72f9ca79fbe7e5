"""Intervals and verdicts: Student's t over seeds, paired where two arms share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finemoe.core.statistics import CONFIDENCE, ratio

__all__ = ["CONFIDENCE", "Interval", "Paired", "interval", "paired"]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the ends are None with fewer than two values."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float]) -> Interval:
    """Mean and two-sided 95 % t interval of independent values."""
    with np.errstate(invalid="ignore"):  # a loss that is not finite has no interval, which the result shows
        spread = ratio(values)
        half = spread.half_interval()
    if half is None:
        return Interval(spread.value, None, None)
    return Interval(spread.value, spread.value - half, spread.value + half)


@dataclass(frozen=True)
class Paired:
    """Loss of `a` minus loss of `b` over the seeds they share, and what that says."""

    difference: Interval
    verdict: str
    """Of `a` relative to `b`: better (lower loss), worse, or undecided."""
    reason: str


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
    """Compare two arms' losses by seed. Pairing removes what a seed does to both: its data order and its luck.

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError("two arms without a common seed cannot be paired")
    difference = interval([a[seed] - b[seed] for seed in seeds])
    if difference.low is None or difference.high is None:
        return Paired(difference, "undecided", "one seed: no interval, run more seeds to decide")
    if difference.high < 0:
        return Paired(difference, "better", f"the 95 % interval over {len(seeds)} seeds lies below 0")
    if difference.low > 0:
        return Paired(difference, "worse", f"the 95 % interval over {len(seeds)} seeds lies above 0")
    return Paired(difference, "undecided", f"the 95 % interval over {len(seeds)} seeds contains 0")
