"""Timing side by side: repetitions of several contestants in turn, and what is said of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Samples = dict[str, list[float]]
"""Seconds of each repetition, by contestant."""
MOST = 4  # times the repetitions asked for, where a budget of seconds allows more
CALL_SECONDS = 0.15  # a repetition lasts at least about this long


@dataclass(frozen=True)
class Contestant:
    """Something that is timed."""

    name: str
    once: Callable[[], float]
    """One repetition; its seconds."""
    at_most: int | None = None
    """Repetitions it takes part in, without a warm-up, where one takes long. None: all."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median, low, high)


def calling(function: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    """One repetition of `calls` calls in this process: seconds of one call."""

    def once() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls

    return once


def calls_needed(function: Callable[[], Any], seconds: float = CALL_SECONDS) -> int:
    """Calls of `function` that together take about `seconds`."""
    function()
    return max(1, min(1000, round(seconds / max(calling(function)(), 1e-6))))


def interleave(
    contestants: Sequence[Contestant],
    repeats: int,
    *,
    budget: float = 0.0,
    watch: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Repetitions in turn, in the given order and then in the opposite one, so that a drift of the machine cancels.

    Args:
        contestants: by different names.
        repeats: rounds, at least.
        budget: seconds up to which rounds go on, to at most `MOST` times `repeats`.
        watch: told what is being timed.
    """
    for contestant in contestants:
        if contestant.at_most is None:
            watch(f"{contestant.name}, warming up")
            contestant.once()
    samples: Samples = {contestant.name: [] for contestant in contestants}
    started = time.perf_counter()
    number = 0
    while number < repeats or (number < MOST * repeats and time.perf_counter() - started < budget):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            if contestant.at_most is None or number < contestant.at_most:
                watch(f"{contestant.name}, {number + 1} of {max(repeats, number + 1)}")
                samples[contestant.name].append(contestant.once())
        number += 1
    return samples


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first / second, round by round; rounds that only one of them ran are left out."""
    return [a / b for a, b in zip(first, second, strict=False)]


def fastest(samples: Samples, names: Sequence[str]) -> str:
    """The one of `names` with the lowest median."""
    return min(names, key=lambda name: statistics.median(samples[name]))
