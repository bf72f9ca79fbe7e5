"""Benchmark scores for people: shares as percent, everything else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.charts.numbers import NOTHING, duration, finite, fixed

_NO_SHARES = frozenset({"bits_per_byte", "loss", "nats_per_word"})
_NAMES = {
    "bits_per_byte": "bits per byte",
    "accuracy_norm": "accuracy (per character)",
    "accuracy_token": "accuracy (per token)",
    "accuracy_uncond": "accuracy (unconditional)",
    "exact_match": "exact match",
    "f1": "F1",
}


_SHORT = {
    "bits_per_byte": "bits/byte",
    "accuracy": "acc",
    "accuracy_norm": "acc norm",
    "accuracy_token": "acc token",
    "accuracy_uncond": "acc uncond",
    "exact_match": "exact",
    "f1": "F1",
}


def is_share(metric: str) -> bool:
    """Whether the metric lies between 0 and 1."""
    return metric not in _NO_SHARES


def metric_name(metric: str) -> str:
    """As people spell it."""
    return _NAMES.get(metric, metric.replace("_", " "))


def short_metric(metric: str) -> str:
    """For a narrow column."""
    return _SHORT.get(metric, metric)


def value_text(value: Any, metric: str) -> str:
    """`34.5 %`, or three decimals."""
    number = finite(value)
    if number is None:
        return NOTHING
    return f"{100 * number:.1f} %" if is_share(metric) else fixed(number)


def score_text(estimate: Mapping[str, Any] | None, metric: str) -> str:
    """`34.5 ± 3.4 %`: a standard error, not an interval.

    Where all items were right or all wrong that error is 0 and says nothing: then the end of the 95 % interval,
    `0.0 (≤ 3.7) %`.
    """
    value, error = finite((estimate or {}).get("value")), finite((estimate or {}).get("standard_error"))
    if value is None or error is None:
        return value_text(value, metric)
    low, high = finite((estimate or {}).get("low")), finite((estimate or {}).get("high"))
    if error == 0 and is_share(metric) and low is not None and high is not None and high > low:
        return f"0.0 (≤ {100 * high:.1f}) %" if value == 0 else f"{100 * value:.1f} (≥ {100 * low:.1f}) %"
    return f"{100 * value:.1f} ± {100 * error:.1f} %" if is_share(metric) else f"{value:.3f} ± {error:.3f}"


def interval_text(estimate: Mapping[str, Any] | None, metric: str) -> str:
    """`31.2 to 38.0 %`."""
    low, high = (finite((estimate or {}).get(end)) for end in ("low", "high"))
    if low is None or high is None:
        return NOTHING
    if is_share(metric):
        return f"{_points(low, 1)} to {_points(high, 1)} %"
    return f"{fixed(low)} to {fixed(high)}"


def difference_text(pair: Mapping[str, Any], metric: str) -> str:
    """`+2.5 ± 1.1 points`."""
    value, error = finite(pair.get("value")), finite(pair.get("standard_error"))
    if value is None:
        return NOTHING
    sign = "+" if value > 0 else ""
    if is_share(metric):
        shown, unit = f"{sign}{_points(value, 1)}", " points"
        spread = "" if error is None else f" ± {100 * error:.1f}"
    else:
        shown, unit, spread = sign + fixed(value), "", "" if error is None else f" ± {error:.3f}"
    return shown + spread + unit


def chance_text(chance: Any, metric: str) -> str:
    """The score of guessing."""
    return value_text(chance, metric)


def p_text(value: Any) -> str:
    """A p-value, never as 0."""
    number = finite(value)
    return NOTHING if number is None else "< 0.001" if number < 0.001 else f"{number:.3f}"


def short_duration(seconds: Any) -> str:
    """As `duration`, which is long for a narrow column: `3:20`, `2:05 h`."""
    number = finite(seconds)
    if number is None or number < 59.5:
        return duration(seconds)
    whole = round(number)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(number / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _points(value: float, decimals: int) -> str:
    return f"{100 * value:.{decimals}f}".replace("-", "−")
