"""Rates over tokens with intervals over windows, for quantities that two models have on the same windows."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

CONFIDENCE = 0.95
Floats = NDArray[np.float64]


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
        """Half the width of the interval; None where no domain has two windows."""
        part = self._part(domain)
        freedom = (self._windows[part] - 1).sum()
        if (self._windows[part] < 2).any():
            return None
        variance = sum(self._variance(number) for number in np.arange(len(self._windows))[part])
        factor = float(student.ppf((1 + confidence) / 2, freedom))
        half: Floats = factor * np.sqrt(np.maximum(variance, 0)) / self._tokens[part].sum()
        return half

    def _variance(self, domain: int) -> Floats:
        """Of the domain's total: W / (W - 1) · sum of (value - ratio · tokens)²."""
        ratio = self._values[domain] / self._tokens[domain]
        residual = self._squares[domain] - 2 * ratio * self._products[domain] + ratio**2 * self._squared_tokens[domain]
        windows = self._windows[domain]
        variance: Floats = windows / (windows - 1) * residual
        return variance

    def _part(self, domain: int | None) -> slice:
        return slice(None) if domain is None else slice(domain, domain + 1)
