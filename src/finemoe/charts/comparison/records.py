"""From `results` to the rows that charts draw: means, windows, label places, differences, loads. No altair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.charts.comparison.words import arm_names, by_loss, known_pairs, loss
from finemoe.charts.numbers import Results, finite

UNITS: Mapping[str, Sequence[tuple[float, str]]] = {
    "tokens": ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1, "tokens")),
    "seconds": ((2 * 86400, "days"), (2 * 3600, "hours"), (120, "minutes"), (0, "seconds")),
}
_SECONDS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0}


def unit_for(largest: float, against: str) -> tuple[float, str]:
    """Divisor and name of the unit in which an axis up to `largest` has short tick labels."""
    if against == "flops":
        power = next((power for power in range(30, 0, -3) if largest >= 10**power), 0)
        return 10.0**power, f"1e{power} FLOPs" if power else "FLOPs"
    units = UNITS["seconds" if against.endswith("seconds") else against]
    unit = next((size, name) for size, name in units if largest >= size or size <= 1)
    return (_SECONDS[unit[1]], unit[1]) if against.endswith("seconds") else unit


def curve(arm: Mapping[str, Any], against: str) -> list[dict[str, float]]:
    """Mean loss over seeds at each step, with the lowest and highest seed; x is the seeds' mean of `against`.

    Only steps that every seed has reached with a finite loss: a mean whose members change would jump.
    """
    by_step: dict[Any, list[tuple[float, float]]] = {}
    seeds = set()
    for point in arm.get("curve") or []:
        x, y = finite(point.get(against)), finite(point.get("validation_loss"))
        if x is not None and y is not None:
            seeds.add(point.get("seed"))
            by_step.setdefault(point.get("step"), []).append((x, y))
    rows = []
    for step in sorted(by_step, key=lambda step: finite(step) or 0.0):
        points = by_step[step]
        if len(points) < len(seeds):
            continue
        losses = [y for _, y in points]
        mean = sum(losses) / len(losses)
        rows.append(
            {
                "x": sum(x for x, _ in points) / len(points),
                "loss": mean,
                "low": min(losses),
                "high": max(losses),
            }
        )
    return rows


def mean_curves(results: Results, against: str) -> dict[str, list[dict[str, Any]]]:
    """Arm -> `curve` rows that also carry the arm's shown name; arms without a curve are left out."""
    names = arm_names(results)
    curves = {arm: curve(record, against) for arm, record in results["arms"].items()}
    return {arm: [row | {"arm": names[arm]} for row in rows] for arm, rows in curves.items() if rows}


def loss_window(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[float, float] | None:
    """The losses worth a y axis: from a little below the best to the worst arm's loss a third of the way in.

    The first fall, from ln(vocabulary) down, would leave the end, which decides, a few pixels high.
    """
    if not curves:
        return None
    lowest = min(row["low"] for rows in curves.values() for row in rows)
    highest = max(row["high"] for rows in curves.values() for row in rows[len(rows) // 3 :])
    # One arm that diverges must not flatten all others; the page names the arms that end above the axis.
    early = sorted(rows[len(rows) // 3]["loss"] for rows in curves.values())
    top = min(highest, 1.5 * early[len(early) // 2])
    pad = 0.04 * (top - lowest) or 0.05
    return lowest - pad, top + pad


def visible(rows: Sequence[dict[str, Any]], window: tuple[float, float]) -> Sequence[dict[str, Any]]:
    """`rows` from the last one before the curve enters the window, so that the line comes in from above."""
    first = next((index for index, row in enumerate(rows) if row["low"] <= window[1]), len(rows) - 1)
    return rows[max(0, first - 1) :]


def above_window(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Shown names of the arms whose curve ends above `loss_window`."""
    window = loss_window(curves)
    return [rows[-1]["arm"] for rows in curves.values() if window and rows[-1]["loss"] > window[1]]


def spread(values: Sequence[float], gap: float, window: tuple[float, float]) -> list[float]:
    """Places for labels: as near to `values` as a distance of `gap` between neighbours and the window allow.

    Pools neighbours that collide and centres each pool on its members: the least-squares answer.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    pools: list[list[float]] = []  # [number of members, mean of value - rank * gap]
    for rank, index in enumerate(order):
        pools.append([1, values[index] - rank * gap])
        while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
            count, mean = pools.pop()
            before = pools[-1]
            before[1] = (before[0] * before[1] + count * mean) / (before[0] + count)
            before[0] += count
    shifts = [mean for count, mean in pools for _ in range(int(count))]
    low, high = window[0], window[1] - (len(values) - 1) * gap
    places = [0.0] * len(values)
    for rank, index in enumerate(order):
        places[index] = max(low, min(shifts[rank], max(low, high))) + rank * gap
    return places


def paper_differences(results: Results) -> tuple[str, list[dict[str, Any]]]:
    """The baseline's name, and for every other arm the paper's and our difference from it, with our interval.

    The baseline is the paper's Dense where it was run, else the run arm for which the paper reports the highest loss.
    Our interval is that of the tested pair; without such a pair there is none.
    """
    names = arm_names(results)
    papers = {arm: finite((results["arms"][arm].get("paper") or {}).get("pile_loss")) for arm in by_loss(results)}
    known = {arm: value for arm, value in papers.items() if value is not None}
    if len(known) < 2:
        return "", []
    dense = [arm for arm in known if results["arms"][arm]["paper"].get("name") == "Dense"]
    baseline = dense[0] if dense else max(known, key=lambda arm: known[arm])
    rows = []
    for arm, value in known.items():
        if arm == baseline:
            continue
        low, high = _interval(results, arm, baseline)
        ours = (loss(results["arms"][arm]) or 0.0) - (loss(results["arms"][baseline]) or 0.0)
        rows.append({"arm": names[arm], "paper": value - known[baseline], "ours": ours, "low": low, "high": high})
    return names[baseline], rows


def _interval(results: Results, first: str, second: str) -> tuple[float | None, float | None]:
    for pair in known_pairs(results):
        low, high = finite(pair.get("low")), finite(pair.get("high"))
        if low is None or high is None:
            continue
        if (pair["a"], pair["b"]) == (first, second):
            return low, high
        if (pair["a"], pair["b"]) == (second, first):
            return -high, -low
    return None, None


def load_records(load: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]] | None) -> list[dict[str, Any]]:
    """One row for each MoE layer and routed expert, both from 0: its fraction, and that fraction times experts.

    Results of earlier versions list the MoE layers and do not say which of all layers they are.
    """
    by_layer = load if isinstance(load, Mapping) else dict(enumerate(load or []))
    return [
        {"layer": int(layer), "expert": expert, "fraction": fraction, "relative": fraction * len(row)}
        for layer, row in by_layer.items()
        for expert, value in enumerate(row)
        if (fraction := finite(value)) is not None
    ]


def shown_max_vio(arm: Mapping[str, Any]) -> float | None:
    """MaxVio, mean of the layers, of the load that is shown: that of the first seed's last validation."""
    points = arm.get("curve") or []
    return next((finite(p.get("max_vio")) for p in reversed(points) if p.get("seed") == points[0].get("seed")), None)
