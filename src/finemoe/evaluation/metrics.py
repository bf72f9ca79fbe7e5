"""Scores with their uncertainty: standard errors, 95 % intervals, and what a paired difference says.

Items are taken as a sample of all that could have been asked. What is 0 or 1 has the binomial standard error and
Wilson's interval. Everything else has the jackknife's error and the wider, at each end, of two intervals: Student's t,
which is too sure where items are skewed, and the studentised bootstrap over items, from a random stream of its own
name. Fewer than ten items decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finemoe.core import seeds
from finemoe.core.statistics import CONFIDENCE, Spread, ratio, ratios, wilson

RESAMPLES = 2000
FEWEST = 10
"""Items, of equal weight, below which nothing is decided."""
_CHUNK = 1 << 18  # numbers drawn at once: what is computed of them stays in a core's cache
_LEAST_ERROR = 0.05  # of a resample's error, as a part of that of all items
LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss", "nats_per_word"})
"""Metrics of which less is more; of all others, more is."""

Method = Literal["binomial", "ratio", "none"]
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A score over items."""

    value: float
    n: int
    standard_error: float | None
    low: float | None
    """Of the 95 % interval."""
    high: float | None
    method: Method


@dataclass(frozen=True)
class Difference:
    """A score of one model minus that of another, over the items that both answered."""

    value: float
    n: int
    standard_error: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    """Of the first model relative to the second."""
    p_value: float | None
    """McNemar's exact test, for what is 0 or 1; else the larger of Student's t and the bootstrap's, two-sided."""
    test: Literal["mcnemar", "ratio", "none"]
    reason: str
    """Why it is undecided; empty where it is decided."""


def estimate(scores: Sequence[float], weights: Sequence[float], stream: str, seed: int = 0) -> Estimate:
    """sum(score · weight) / sum(weight) and its uncertainty.

    Args:
        scores: one an item, at least one.
        weights: one an item, of which some are above 0.
        stream: names the random numbers; equal names and data give equal intervals.
        seed: of all streams.
    """
    values, weight = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    mean, n = _mean(values, weight), len(values)
    if is_binary(values, weight):
        low, high = wilson(mean, n)
        return Estimate(mean, n, math.sqrt(mean * (1 - mean) / n), low, high, "binomial")
    spread = ratio(values, weight)
    if spread.error is None:
        return Estimate(mean, n, None, None, None, "none")
    low, high = _interval(spread, _studentised(values, weight, spread, stream, seed))
    return Estimate(mean, n, spread.error, low, high, "ratio")


def is_binary(values: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    """Whether these are right-or-wrong scores that all count the same."""
    return bool(np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all())


def macro(groups: Sequence[Estimate]) -> Estimate:
    """The mean of groups that all count the same, whatever their size; their errors are independent.

    Without an error where a group has one item, or where no group has right and wrong ones: nothing tells it then.
    """
    value = math.fsum(group.value for group in groups) / len(groups)
    n = sum(group.n for group in groups)
    # Of n items, error² is on average (n - 1)/n of what it should be: much where groups are small.
    each = [(group.standard_error or 0.0) ** 2 * group.n / max(1, group.n - 1) for group in groups]
    error = math.sqrt(math.fsum(each)) / len(groups)
    if error == 0 or any(group.n < 2 for group in groups):
        return Estimate(value, n, None, None, None, "none")
    # Degrees of freedom after Welch and Satterthwaite.
    freedom = math.fsum(each) ** 2 / math.fsum(one**2 / (group.n - 1) for one, group in zip(each, groups, strict=True))
    half = Spread(value, error, freedom + 1).half_interval() or 0.0
    return Estimate(value, n, error, value - half, value + half, groups[0].method)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float],
    *,
    lower_is_better: bool,
    stream: str,
    seed: int = 0,
) -> Difference:
    """What two models' scores on the same items, in the same order, say about which is better.

    Pairing takes out what makes an item hard for both. Undecided: the test does not reject at 5 %, or there are fewer
    than `FEWEST` items of equal weight, or of unequal weight what tells no more, or a score is NaN or infinite.

    Args:
        first: one an item.
        second: one an item.
        weights: one an item.
        lower_is_better: of bits per byte, for example.
        stream: names the random numbers.
        seed: of all streams.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float64)
    differences, n = one - two, len(one)
    value = _mean(differences, weight)
    spread = ratio(differences, weight)
    if spread.error is None:
        return Difference(value, n, None, None, None, "undecided", None, "none", _too_few(n, spread))
    test: Literal["mcnemar", "ratio"]
    if is_binary(one, weight) and is_binary(two, weight):
        low, high = _interval(spread, None)
        p, test = mcnemar(int((differences > 0).sum()), int((differences < 0).sum())), "mcnemar"
    else:
        drawn = _studentised(differences, weight, spread, stream, seed)
        low, high = _interval(spread, drawn)
        p, test = _p_value(spread, drawn), "ratio"
    reason = _too_few(n, spread)
    if not reason and not math.isfinite(p):
        reason = "a score is no finite number"
    if not reason and (p >= 1 - CONFIDENCE or value == 0):
        reason = "a difference of this size may be chance"
    better = (value < 0) == lower_is_better
    verdict: Verdict = "undecided" if reason else "better" if better else "worse"
    return Difference(value, n, spread.error, low, high, verdict, p, test, reason)


def _too_few(n: int, spread: Spread) -> str:
    """Why so few items decide nothing; empty where they are enough."""
    if n < FEWEST:
        return f"{n} item{'s' if n > 1 else ''}; fewer than {FEWEST} decide nothing"
    if spread.effective < FEWEST - 1e-6:
        return f"{n} items tell as much as {spread.effective:.1f} of equal weight; fewer than {FEWEST} decide nothing"
    return ""


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models are right equally often, from the items that just one got right."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if not discordant else float(binomtest(only_first, discordant, 0.5).pvalue)


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return math.fsum(values * weights) / math.fsum(weights)


def _studentised(
    values: NDArray[np.float64], weights: NDArray[np.float64], spread: Spread, stream: str, seed: int
) -> NDArray[np.float64]:
    """How many errors of its own each of `RESAMPLES` samples, drawn with replacement, lies from the score of all."""
    generator = np.random.default_rng(seeds.derive(seed, "bootstrap", stream))
    values, weights = values[weights > 0], weights[weights > 0]
    n = len(values)
    rows = max(1, _CHUNK // n)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        index = generator.integers(n, size=(min(rows, RESAMPLES - start), n))
        found, errors, _ = ratios(values[index], weights[index])
        # A sample of one item again and again has no error of its own; infinite ends would say nothing.
        drawn.append((found - spread.value) / np.maximum(errors, _LEAST_ERROR * (spread.error or 1.0)))
    return np.concatenate(drawn)


def _interval(spread: Spread, drawn: NDArray[np.float64] | None) -> tuple[float, float]:
    """The 95 % interval: at each end the wider of Student's t and the studentised bootstrap."""
    half, error = spread.half_interval() or 0.0, spread.error or 0.0
    below = above = half
    if drawn is not None and error > 0:
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(drawn, (tail, 100 - tail))
        below, above = max(half, float(high) * error), max(half, -float(low) * error)
    return spread.value - below, spread.value + above


def _p_value(spread: Spread, drawn: NDArray[np.float64]) -> float:
    """The larger of the two tests' p-values, so that the interval leaves 0 out where this is below 5 %."""
    student = spread.p_value() or 0.0
    if not spread.error:
        return student
    seen = spread.value / spread.error
    above, below = int((drawn >= seen).sum()), int((drawn <= seen).sum())
    return max(student, min(1.0, 2 * (min(above, below) + 1) / (len(drawn) + 1)))
