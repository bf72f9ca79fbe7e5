"""Intervals and verdicts: Student's t over seeds, paired where two arms share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finemoe.core.statistics import CONFIDENCE, ratio

__all__ = [
    "CONFIDENCE", "NO_ROOM", "Interval", "Paired", "Relation", "interval", "paired", "points_against", "verdict_on",
]  # fmt: skip

Relation = Literal["lower", "higher", "no_higher", "equal"]
"""How a claim says that one figure stands to another."""
NO_ROOM = "no room"
"""How the reason begins where what is said not to rise could not."""


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


def verdict_on(
    relation: Relation, difference: Interval | None, seeds: int, margin: float, room: float | None = None
) -> tuple[str, str]:
    """Verdict and reason: what the 95 % interval of `a` - `b` over seeds says of the claim that it is so.

    `lower` is reproduced by an interval below 0 and contradicted by one above, `higher` the other way; `no_higher`
    allows `margin`; `equal` is reproduced by an interval within ±`margin` and contradicted by one wholly outside.

    Args:
        relation: how `a` is said to stand to `b`.
        difference: `a` - `b`, in the figure's unit; None where nothing is known of one.
        seeds: how many it is of.
        margin: within which two count as equal.
        room: how far `b` is from the highest value that the figure can have; None where it has none. Within `margin` of
            it nothing can rise, so that `no_higher` says nothing.
    """
    if difference is None:
        return "not run", "a run it needs has not finished"
    if difference.low is None or difference.high is None:
        return "undecided", "one seed: no interval"
    if relation == "no_higher" and room is not None and room <= margin:
        return "undecided", f"{NO_ROOM}: it could rise by {room:.3f} at most, and {margin:g} counts as nothing"
    low, high = difference.low, difference.high
    span = f"{difference.mean:+.3f} ({low:+.3f} to {high:+.3f}, {seeds} seeds)"
    if relation == "equal":
        if low >= -margin and high <= margin:
            return "reproduced", f"{span} lies within ±{margin}"
        if low > margin or high < -margin:
            return "contradicted", f"{span} lies outside ±{margin}"
        return "undecided", f"{span} reaches over ±{margin}"
    if relation == "higher":
        if low > 0:
            return "reproduced", f"{span} lies above 0"
        return ("contradicted", f"{span} lies below 0") if high < 0 else ("undecided", f"{span} contains 0")
    bound = margin if relation == "no_higher" else 0.0
    shown = f"{bound:g}" if bound else "0"
    if high <= bound and (bound or high < 0):
        return "reproduced", f"{span} lies below {shown}"
    if low > bound:
        return "contradicted", f"{span} lies above {shown}"
    return "undecided", f"{span} contains {shown}"


def points_against(relation: Relation, mean: float, margin: float) -> bool:
    """Whether the mean alone says the opposite of the claim, whatever the interval allows."""
    if relation == "equal":
        return abs(mean) > margin
    return mean < 0 if relation == "higher" else mean > (margin if relation == "no_higher" else 0)
