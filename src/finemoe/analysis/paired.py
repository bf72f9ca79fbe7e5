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
        half: Floats = student.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance) / self._tokens[part].sum()
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
