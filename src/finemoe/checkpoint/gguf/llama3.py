"""Llama 3.1's rotary scaling from the factors of `rope_freqs.weight`, which are all that a GGUF file keeps of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finemoe.core.errors import CheckpointError


def llama3_scaling(factors: Tensor, theta: float, where: str) -> dict[str, Any]:
    """Llama 3.1's scaling from the factors that it divides frequencies by: 1, then a blend, then the largest.

    The factors leave the unit of `original_max_positions` open; it is chosen so that `low_freq_factor` is 1 where that
    makes it a whole number. Where few components are blended, several scalings give the same factors: one of them.

    Raises:
        CheckpointError: the factors are of another kind.
    """
    dim = 2 * factors.numel()
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    found = factors.double().flatten()
    largest = found.max().item()
    if math.isfinite(largest) and largest > 1:
        kept = (1 / found - 1 / largest) / (1 - 1 / largest)
        for low, high, original in _candidates(plain, kept):
            turns = original * plain / (2 * math.pi)
            again = ((turns - low) / (high - low)).clamp(0, 1)
            if torch.allclose(1 / (again + (1 - again) / largest), found, rtol=1e-5, atol=0):
                scaling = {"kind": "llama3", "factor": float(f"{largest:.7g}"), "low_freq_factor": low}
                return {**scaling, "high_freq_factor": high, "original_max_positions": original}
    raise CheckpointError(f"{where}: rope_freqs.weight holds factors that are not Llama 3.1's scaling")


_WHOLE = 1 << 20
"""An `original_max_positions` that is whole whatever the factors are; low and high are in its unit."""


def _candidates(plain: Tensor, kept: Tensor) -> Iterator[tuple[float, float, int]]:
    """(low_freq_factor, high_freq_factor, original_max_positions) to try: the published ones, then those of a line."""
    yield 1.0, 4.0, 8192
    slope, level = _line(plain, kept)
    if level < 0 < slope:
        high = round(1 - 1 / level, 4)
        original = round(slope * 2 * math.pi * (high - 1))
        if high > 1 and original >= 1:
            yield 1.0, high, original
        wide = _WHOLE / (2 * math.pi * slope)
        yield -level * wide, (1 - level) * wide, _WHOLE


def _line(plain: Tensor, kept: Tensor) -> tuple[float, float]:
    """Slope and level of the blend over the frequencies; 0 and 0 where the factors do not tell."""
    blend = (kept > 1e-4) & (kept < 1 - 1e-4)
    x, y = plain[blend], kept[blend]
    if len(x) >= 2:
        slope, level = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), y[:, None]).solution.flatten()
        return slope.item(), level.item()
    whole, none = plain[kept >= 1 - 1e-4], plain[kept <= 1e-4]
    fastest_none = none.max().item() if len(none) else 0.0
    if len(x) == 1:  # any line through it that is steep enough for its neighbours
        x0, y0 = x.item(), y.item()
        slopes = [y0 / (x0 - fastest_none)] + ([(1 - y0) / (whole.min().item() - x0)] if len(whole) else [])
        return max(slopes), y0 - max(slopes) * x0
    if not len(none):
        return 0.0, 0.0
    slowest_whole = whole.min().item() if len(whole) else 2 * fastest_none
    slope = 1 / (slowest_whole - fastest_none)
    return slope, -slope * fastest_none
