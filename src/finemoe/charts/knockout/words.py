"""What a knock-out did, in words: shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.charts.numbers import NOTHING, finite, fixed


def change(effect: Mapping[str, Any] | None, decimals: int = 3) -> str:
    """`+0.173 (+0.152 to +0.195)`, or only the mean where there is no interval."""
    mean, low, high = (finite((effect or {}).get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return NOTHING
    if mean == low == high == 0:
        return "0"
    shown = signed(mean, decimals)
    return shown if low is None or high is None else f"{shown} ({signed(low, decimals)} to {signed(high, decimals)})"


def signed(value: float, decimals: int = 3) -> str:
    """A number with its sign, a true minus, and none on what rounds to 0."""
    text = fixed(value, decimals)
    return text.removeprefix("−") if not float(text.replace("−", "-")) else text if text[0] == "−" else f"+{text}"


def by_size(found: Sequence[Mapping[str, Any]], effect: str = "difference") -> list[Mapping[str, Any]]:
    """Records, the largest effect first."""
    return sorted(found, key=lambda one: -(finite(one[effect]["mean"]) or 0.0))


def verdict(effect: Mapping[str, Any]) -> str:
    """What an interaction says of a pair."""
    low, high = finite(effect.get("low")), finite(effect.get("high"))
    if low is not None and low > 0:
        return "redundant"
    if high is not None and high < 0:
        return "work together"
    return "undecided"
