"""Scores with their uncertainty: standard errors, 95 % intervals, and what a paired difference says.

Items are taken as a sample of all that could have been asked. What is 0 or 1 has the binomial standard error and
Wilson's interval; everything else the bootstrap over items, from a random stream of its own name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finemoe.core import seeds

CONFIDENCE = 0.95
RESAMPLES = 2000
_Z = 1.959963984540054  # of the normal distribution, two-sided 95 %
_CHUNK = 1 << 22  # numbers drawn at once
LOWER_IS_BETTER = frozenset({"bits_per_byte", "loss", "nats_per_word"})
"""Metrics of which less is more; of all others, more is."""

Method = Literal["binomial", "bootstrap", "none"]
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
    """McNemar's exact test, for what is 0 or 1; else of the bootstrap, two-sided."""
    test: Literal["mcnemar", "bootstrap", "none"]


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
    if n < 2:
        return Estimate(mean, n, None, None, None, "none")
    drawn = _resampled(values, weight, stream, seed)
    low, high = _percentiles(drawn)
    return Estimate(mean, n, float(drawn.std(ddof=1)), low, high, "bootstrap")


def is_binary(values: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    """Whether these are right-or-wrong scores that all count the same."""
    return bool(np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all())


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: unlike mean ± 2 errors it is sensible at 0 and at 1."""
    shrunk = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / shrunk
    half = _Z / shrunk * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


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
    return Estimate(value, n, error, value - _Z * error, value + _Z * error, groups[0].method)


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

    Pairing takes out what makes an item hard for both. Undecided: the test does not reject at 5 %.

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
    if n < 2:
        return Difference(value, n, None, None, None, "undecided", None, "none")
    test: Literal["mcnemar", "bootstrap"]
    if is_binary(one, weight) and is_binary(two, weight):
        error = float(differences.std(ddof=1)) / math.sqrt(n)
        low, high, test = value - _Z * error, value + _Z * error, "mcnemar"
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        drawn = _resampled(differences, weight, stream, seed)
        error, (low, high), test = float(drawn.std(ddof=1)), _percentiles(drawn), "bootstrap"
        above, below = (int((drawn * sign >= 0).sum()) for sign in (1, -1))
        p = min(1.0, 2 * (min(above, below) + 1) / (len(drawn) + 1))
    decided = p < 1 - CONFIDENCE and value != 0
    verdict: Verdict = "undecided" if not decided else "better" if (value < 0) == lower_is_better else "worse"
    return Difference(value, n, error, low, high, verdict, p, test)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value that two models are right equally often, from the items that just one got right."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if not discordant else float(binomtest(only_first, discordant, 0.5).pvalue)


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return math.fsum(values * weights) / math.fsum(weights)


def _resampled(
    values: NDArray[np.float64], weights: NDArray[np.float64], stream: str, seed: int
) -> NDArray[np.float64]:
    """The score of `RESAMPLES` samples of items, drawn with replacement."""
    generator = np.random.default_rng(seeds.derive(seed, "bootstrap", stream))
    n, scaled = len(values), values * weights
    rows = max(1, _CHUNK // n)
    drawn = []
    for start in range(0, RESAMPLES, rows):
        index = generator.integers(n, size=(min(rows, RESAMPLES - start), n))
        drawn.append(scaled[index].sum(axis=1) / weights[index].sum(axis=1))
    return np.concatenate(drawn)


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return float(low), float(high)
