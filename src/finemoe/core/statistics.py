"""Means and ratios with what they are sure to: Student's t, for items of equal and of unequal weight.

One estimator for whoever asks whether a difference is more than noise: `ratio` where the items are at hand, and
`PairedRates` where there are too many quantities to keep them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of the normal distribution, two-sided 95 %
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A weighted mean and how sure it is."""

    value: float
    error: float | None
    """Standard error; None where one item has all the weight."""
    effective: float
    """Items of equal weight that would tell as much: (sum of weights)² / sum of weights²."""

    @property
    def freedom(self) -> float:
        """Degrees of freedom of Student's t."""
        return max(self.effective - 1, _LEAST_FREEDOM)

    def half_interval(self, confidence: float = CONFIDENCE) -> float | None:
        """Half the width of the two-sided interval."""
        return None if self.error is None else float(_quantile(confidence, self.freedom)) * self.error

    def p_value(self) -> float | None:
        """Of the two-sided test that the truth is 0."""
        if self.error is None:
            return None
        if self.error == 0:
            return float(self.value == 0)
        from scipy.special import stdtr

        return 2 * float(stdtr(self.freedom, -abs(self.value) / self.error))


def _quantile(confidence: float, freedom: ArrayLike) -> Any:
    """Of Student's t, two-sided."""
    from scipy.special import stdtrit  # a fifth of a second, and scipy.stats is most of one: a run needs neither

    return stdtrit(freedom, (1 + confidence) / 2)


_LEAST_FREEDOM = 0.1


def ratio(values: ArrayLike, weights: ArrayLike | None = None) -> Spread:
    """sum(value · weight) / sum(weight) of independent items; without weights the mean.

    Args:
        values: [items].
        weights: [items], some of them above 0.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    value, error, effective = (float(found) for found in ratios(values[weights > 0], weights[weights > 0]))
    return Spread(value, None if effective < 1 + 1e-9 else error, effective)


def ratios(values: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """`ratio` of many samples `[..., items]` at once: values, errors and effective numbers `[...]`.

    The error is the jackknife's: each item's residual is divided by what the others weigh, without which a few heavy
    items would make the interval too short. With equal weights it is s / sqrt(n).
    """
    items = values.shape[-1]
    shares = weights / weights.sum(axis=-1, keepdims=True)
    value = (shares * values).sum(axis=-1)
    pulls = shares * (values - value[..., None]) / np.maximum(1 - shares, np.finfo(np.float64).eps)
    errors: Floats = np.sqrt((pulls**2).sum(axis=-1) * (items - 1) / items)
    return value, errors, 1 / (shares**2).sum(axis=-1)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: unlike mean ± 2 errors it is sensible at 0 and at 1."""
    shrunk = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / shrunk
    half = _Z / shrunk * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@final
class PairedRates:
    """Totals of a quantity over totals of tokens, window by window, with a t interval over the windows.

    The ratio estimator: the variance is that of each window's residual from its domain's ratio, so that windows of
    different lengths weigh as they should and the mix of domains is not taken for noise. Only moments are kept.
    """

    def __init__(self, num_domains: int, shape: tuple[int, ...]) -> None:
        self._windows = np.zeros(num_domains)
        self._tokens = np.zeros(num_domains)
        self._squared_tokens = np.zeros(num_domains)
        self._values = np.zeros((num_domains, *shape))
        self._squares = np.zeros((num_domains, *shape))
        self._products = np.zeros((num_domains, *shape))

    def add(self, domain: int, values: Floats, tokens: Floats) -> None:
        """Count windows of one domain: `values [windows, ...]` in total, `tokens [windows]`, none of them 0."""
        across = tokens.reshape(-1, *[1] * (values.ndim - 1))
        self._windows[domain] += len(tokens)
        self._tokens[domain] += tokens.sum()
        self._squared_tokens[domain] += (tokens**2).sum()
        self._values[domain] += values.sum(axis=0)
        self._squares[domain] += (values**2).sum(axis=0)
        self._products[domain] += (values * across).sum(axis=0)

    def rate(self, domain: int | None = None) -> Floats:
        """The ratio in one domain, or in all the text."""
        part = self._part(domain)
        ratio: Floats = self._values[part].sum(axis=0) / self._tokens[part].sum()
        return ratio

    def half_interval(self, domain: int | None = None, confidence: float = CONFIDENCE) -> Floats | None:
        """Half the width of the interval in one domain, or in all the text; None with fewer than two windows.

        Domains are strata, each with a scatter of its own, hence degrees of freedom after Welch and Satterthwaite. A
        domain of a single window has no scatter, so that all windows are then one stratum.
        """
        part = self._part(domain)
        strata = [slice(number, number + 1) for number in np.arange(len(self._windows))[part]]
        if (self._windows[part] < 2).any():
            strata = [part]
        windows = np.array([self._windows[stratum].sum() for stratum in strata])
        if (windows < 2).any():
            return None
        variances = np.stack([self._variance(stratum) for stratum in strata])
        variance = variances.sum(axis=0)
        weights = (windows - 1).reshape(-1, *[1] * (variances.ndim - 1))
        scatter = np.where(variance > 0, (variances**2 / weights).sum(axis=0), 1.0)
        freedom = np.where(variance > 0, variance, 1.0) ** 2 / scatter
        half: Floats = _quantile(confidence, freedom) * np.sqrt(variance) / self._tokens[part].sum()
        return half

    def _variance(self, stratum: slice) -> Floats:
        """Of the stratum's total: W / (W - 1) · sum of (value - ratio · tokens)²."""
        values, squares, products, windows, tokens, squared_tokens = (
            moment[stratum].sum(axis=0)
            for moment in (
                self._values, self._squares, self._products, self._windows, self._tokens, self._squared_tokens
            )
        )  # fmt: skip
        ratio = values / tokens
        residual = squares - 2 * ratio * products + ratio**2 * squared_tokens
        variance: Floats = windows / (windows - 1) * np.maximum(residual, 0)
        return variance

    def _part(self, domain: int | None) -> slice:
        return slice(None) if domain is None else slice(domain, domain + 1)
