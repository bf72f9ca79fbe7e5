"""How cost grows: a power law through the times of a token, and its exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fit:
    """time = c · size ^ exponent, by least squares on logarithms."""

    exponent: float
    low: float
    """The smallest slope between two neighbouring sizes."""
    high: float
    """The largest."""

    @staticmethod
    def of(sizes: Sequence[float], values: Sequence[float]) -> Fit:
        """Through at least two points.

        Raises:
            ValueError: fewer points, or what has no logarithm.
        """
        if len(sizes) != len(values) or len(sizes) < 2 or min(*sizes, *values) <= 0:
            raise ValueError(f"no power law through sizes {list(sizes)} and values {list(values)}")
        x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(values, dtype=float))
        slopes = np.diff(y) / np.diff(x)
        exponent = round(float(np.polyfit(x, y, 1)[0]), 6) + 0.0  # neither -1e-17 nor -0 where nothing grows
        return Fit(exponent, float(slopes.min()), float(slopes.max()))


@dataclass(frozen=True)
class Growth:
    """Time of one token against one size."""

    what: str
    variable: str
    sizes: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    """Of one token, every repetition of every size."""
    flops_per_token: tuple[float, ...]

    @property
    def fit(self) -> Fit:
        """Of the median times."""
        return Fit.of(self.sizes, [float(np.median(samples)) for samples in self.seconds])

    @property
    def flops(self) -> Fit:
        """Of the FLOPs: the exponent that time would have were every FLOP as fast."""
        return Fit.of(self.sizes, self.flops_per_token)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with every sample."""
        return {
            "what": self.what,
            "variable": self.variable,
            "sizes": list(self.sizes),
            "seconds_per_token": [list(samples) for samples in self.seconds],
            "flops_per_token": list(self.flops_per_token),
            "fit": asdict(self.fit),
            "flops_fit": asdict(self.flops),
        }


def doubling(first: int, last: int) -> list[int]:
    """first, 2 · first ... last."""
    return [first << step for step in range(round(math.log2(last / first)) + 1)]
