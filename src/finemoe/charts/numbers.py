"""Numbers for people: three significant digits, a unit, and an honest dash where there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

NOTHING = "–"
Results = Mapping[str, Any]
"""What a results.json holds; which keys is the affair of each kind of report."""


def finite(value: Any) -> float | None:
    """`value` as a float; None for None, NaN, infinities and what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def clean(value: Any) -> Any:
    """A deep copy in which every NaN and infinity is None: JSON has no name for them, and neither has a reader."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return value


def count(value: Any) -> str:
    """A count with three significant digits: 850, 12.4K, 1.97B, 104.9B tokens would read 105B."""
    number = finite(value)
    if number is None:
        return NOTHING
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{_three_digits(number / size)}{suffix}"
    return f"{number:.0f}"


def _three_digits(number: float) -> str:
    decimals = max(0, 2 - math.floor(math.log10(abs(number) * 1.0005))) if number else 0
    return f"{number:.{decimals}f}"


def scientific(value: Any) -> str:
    """4.33e15, the way FLOPs are written; no letter that one reader takes for 10^9 and another for 10^12."""
    number = finite(value)
    if number is None:
        return NOTHING
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: Any) -> str:
    """48 s, 3 min 20 s, 2 h 05 min."""
    number = finite(seconds)
    if number is None:
        return NOTHING
    if number < 9.95:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(number / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(value: Any) -> str:
    """A signed percentage with one decimal: +0.4 %, −1.2 %, 0.0 %."""
    number = finite(value)
    if number is None:
        return NOTHING
    shown = f"{abs(number):.1f}"
    sign = "" if float(shown) == 0 else "+" if number > 0 else "−"
    return f"{sign}{shown} %"


def fixed(value: Any, decimals: int = 3) -> str:
    """A number with a fixed count of decimals and a true minus sign."""
    number = finite(value)
    return NOTHING if number is None else f"{number:.{decimals}f}".replace("-", "−")


def half_interval(stat: Mapping[str, Any] | None) -> float | None:
    """Half the width of `low`..`high`; None where there is no interval."""
    low, high = (finite((stat or {}).get(key)) for key in ("low", "high"))
    return None if low is None or high is None else (high - low) / 2


def plus_minus(stat: Mapping[str, Any] | None, decimals: int = 3) -> str:
    """`1.808 ± 0.003`, or only the mean where there is no interval."""
    half = half_interval(stat)
    mean = fixed((stat or {}).get("mean"), decimals)
    return mean if half is None or mean == NOTHING else f"{mean} ± {fixed(half, decimals)}"


def decimals_for(stats: Iterable[Mapping[str, Any] | None]) -> int:
    """Three decimals, or four when some interval is so narrow that three would print it as nothing."""
    halves = [half for half in map(half_interval, stats) if half]
    return 4 if halves and min(halves) < 0.0015 else 3
