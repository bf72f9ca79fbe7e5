"""The figures of one run: loss, balance, the load of every expert, and single figures of its steps.

Each function takes the results of `finemoe show RUN --out` and returns a chart, or None with nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.comparison.records import load_records, unit_for
from finemoe.charts.numbers import Results, clean, finite, fixed

LOSS = "loss (nats per token)"
_MOST_LINES = 8
_HEIGHT = 240


def figures(results: Results) -> dict[str, Any]:
    """Every figure that the run can fill, by file name; the reward instead of the loss where it learns from its own."""
    results = clean(results)
    first = {"reward": reward_chart(results)} if answers_itself(results) else {"loss": loss_chart(results)}
    made = {**first, "balance": balance_chart(results), "load": load_map(results),
            "speed": line_chart(results, "tokens_per_second", "tokens per second"),
            "learning_rate": line_chart(results, "learning_rate", "learning rate"),
            "gradient": line_chart(results, "gradient_norm", "gradient norm")}  # fmt: skip
    return {name: chart for name, chart in made.items() if chart is not None}


def answers_itself(results: Results) -> bool:
    """Whether the run learns from answers of its own, of which no two steps have the same number of tokens."""
    return (results["config"].get("method") or {}).get("kind") == "grpo"


class _Along:
    """What the figures of a run are drawn along: tokens; or steps, where the model writes the tokens itself."""

    def __init__(self, results: Results) -> None:
        points = [*results["steps"], *results["validations"]]
        self._key = "step" if answers_itself(results) else "tokens"
        most = max(point[self._key] for point in points)
        self._size, unit = (1.0, "steps") if self._key == "step" else unit_for(most, "tokens")
        scale = alt.Scale(domain=[0, 1.01 * most / self._size], nice=False)
        self.title = "training steps" if self._key == "step" else "training tokens"
        title = self.title + ("" if unit in ("tokens", "steps") else f" ({unit})")
        self.x = alt.X("x:Q", title=title, scale=scale, axis=theme.FEW_TICKS)

    def at(self, point: Mapping[str, Any]) -> float:
        """Where a point of the run stands."""
        return float(point[self._key] / self._size)


def loss_chart(results: Results) -> Any | None:
    """Training loss as a line and validation as markers, from where the first steep fall is over."""
    names = ("training", "validation")
    if not results["steps"]:
        return None
    rows = [
        {"tokens": point["tokens"], "step": point["step"], "value": value, "arm": name}
        for name, points, key in (
            (names[0], results["steps"], "loss"), (names[1], results["validations"], "validation_loss")
        )
        for point in points
        if (value := finite(point.get(key))) is not None
    ]  # fmt: skip
    if not rows:
        return None
    low, high = _window([row["value"] for row in rows if row["arm"] == names[0]] or [row["value"] for row in rows])
    low = min([low, *(row["value"] for row in rows)])
    pad = 0.04 * (high - low) or 0.05
    return curves(results, rows, names, LOSS, (low - pad, high + pad))


def reward_chart(results: Results) -> Any | None:
    """Reward of the answers that were learnt as a line, and of held-out questions as markers."""
    names = ("training", "held out")
    found = [
        (names[0], [{**point, **point.get("figures", {})} for point in results["steps"]], "reward"),
        (names[1], results["validations"], "validation_reward"),
    ]
    rows = [
        {"step": point["step"], "value": value, "arm": name}
        for name, points, key in found
        for point in points
        if (value := finite(point.get(key))) is not None
    ]
    if not rows:
        return None
    low, high = min(row["value"] for row in rows), max(row["value"] for row in rows)
    pad = 0.04 * (high - low) or 0.05
    return curves(results, rows, names, "reward", (low - pad, high + pad))


def curves(
    results: Results, rows: Sequence[Mapping[str, Any]], names: tuple[str, str], title: str, within: tuple[float, float]
) -> Any:
    """One figure as it was in training, a line, and as it was measured on what was held out, markers.

    Args:
        results: of the run.
        rows: step, tokens where it is drawn along them, value and `arm`, which is one of `names`.
        names: of the two; what has no row is not in the legend.
        title: of the figure.
        within: lowest and highest value that the axis has.
    """
    along = _Along(results)
    x, there = along.x, [name for name in names if any(row["arm"] == name for row in rows)]
    y = alt.Y("value:Q", title=title, scale=alt.Scale(domain=list(within), nice=False))
    color = alt.Color("arm:N", scale=alt.Scale(domain=there), legend=alt.Legend(orient="top", title=None))
    marks = theme.base([{**row, "x": along.at(row)} for row in rows])
    tips = [alt.Tooltip("arm:N", title="of"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title=title, format=".4f")]
    line = marks.transform_filter(f"datum.arm === '{names[0]}'").mark_line(strokeWidth=1.6, clip=True)
    held = marks.transform_filter(f"datum.arm === '{names[1]}'")
    layers = [
        line.encode(x, y, color, tooltip=tips),
        held.mark_line(strokeWidth=1.6, strokeDash=[5, 3], clip=True).encode(x, y, color),
        held.mark_point(size=60, filled=True, opacity=1, clip=True).encode(x, y, color, tooltip=tips),
    ]
    last = {row["arm"]: row for row in rows}
    said = ", ".join(f"{name} {fixed(row['value'])}" for name, row in last.items())
    return alt.layer(*layers).properties(
        width=theme.WIDTH - 60, height=320, description=f"{title} against {along.title}. At the end: {said}."
    )


def _window(losses: Sequence[float]) -> tuple[float, float]:
    """Lowest loss, and the highest after the first twentieth: the fall from ln(vocabulary) would flatten the rest."""
    later = losses[len(losses) // 20 :]
    return min(losses), max(later)


def balance_chart(results: Results) -> Any | None:
    """MaxVio of every MoE layer against tokens; of many layers their mean and their range."""
    found = [point for point in results["steps"] if point.get("max_vio_per_layer")]
    if not found:
        return None
    along = _Along(results)
    x = along.x
    layers = list(found[-1]["max_vio_per_layer"])
    y = alt.Y("value:Q", title="MaxVio", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5))
    ends = ", ".join(f"layer {layer} {fixed(found[-1]['max_vio_per_layer'][layer], 2)}" for layer in layers)
    about = {"width": theme.WIDTH - 60, "height": _HEIGHT, "description": f"MaxVio in training steps, at last: {ends}."}
    if len(layers) > _MOST_LINES:
        rows = []
        for point in found:
            values = [value for value in point["max_vio_per_layer"].values() if value is not None]
            middle = sum(values) / len(values)
            rows.append({"x": along.at(point), "value": middle, "low": min(values), "high": max(values)})
        marks = theme.base(rows)
        band = marks.mark_area(opacity=0.18).encode(x, alt.Y("low:Q", title="MaxVio"), alt.Y2("high:Q"))
        return alt.layer(band, marks.mark_line(strokeWidth=1.8).encode(x, y)).properties(**about)
    rows = [
        {"x": along.at(point), "value": value, "arm": f"layer {layer}", "step": point["step"]}
        for point in found
        for layer, value in point["max_vio_per_layer"].items()
    ]
    names = [f"layer {layer}" for layer in layers]
    legend = alt.Legend(orient="top", title=None, columns=4)
    dashes = alt.Scale(domain=names, range=theme.arm_dashes(len(names)))
    color = alt.Color("arm:N", scale=alt.Scale(domain=names), legend=legend)
    dash = alt.StrokeDash("arm:N", scale=dashes, legend=legend)
    tips = [alt.Tooltip("arm:N", title="layer"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".2f")]
    return theme.base(rows).mark_line(strokeWidth=1.8).encode(x, y, color, dash, tooltip=tips).properties(**about)


def load_map(results: Results) -> Any | None:
    """Layer by expert: the load relative to an even share, of the last validation, or of the last step before one."""
    rows = load_records(results["load"])
    if not rows:
        return None
    layers, experts = len({row["layer"] for row in rows}), max(row["expert"] for row in rows) + 1
    top = min(max([2.0, *(row["relative"] for row in rows)]), theme.HOTTEST)
    axis = alt.Axis(labelAngle=0, values=theme.expert_ticks(experts), labelOverlap=True)
    tips = [alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), alt.Tooltip("relative:Q", title="÷ even", format=".2f")]
    bands = alt.Scale(paddingInner=0.06)
    return (
        theme.base(rows)
        .mark_rect()
        .encode(
            alt.X("expert:O", title="routed expert", axis=axis, scale=bands),
            alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True), scale=bands),
            theme.load_color("relative:Q", top, "load ÷ even share", length=200),
            tooltip=tips,
        )
        .properties(
            width=theme.WIDTH - 60,
            height=alt.Step(22 if layers <= 12 else 12),
            description=f"Load of {experts} routed experts in {layers} layers relative to an even share.",
        )
    )


def line_chart(
    results: Results, key: str, title: str, numbers: str = "~s", *, floor: float | None = None
) -> Any | None:
    """One figure of the steps against tokens: a line, or points where most steps have none, between which nothing is.

    Args:
        results: of the run.
        key: of a step's record.
        title: of the figure.
        numbers: the form of the axis', in d3's words.
        floor: what the axis reaches at least; None: no more than the figure does.
    """
    found = [point for point in results["steps"] if finite(point.get(key)) is not None]
    if not found:
        return None
    along = _Along(results)
    x = along.x
    rows = [{"x": along.at(point), "value": point[key], "step": point["step"]} for point in found]
    form = "~g" if key == "learning_rate" else numbers
    values = [row["value"] for row in rows]
    scale = alt.Scale(zero=True)
    if floor is not None and max(map(abs, values)) < floor:
        scale = alt.Scale(domain=[-floor if min(values) < -floor / 100 else 0, floor], clamp=True)
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5, format=form))
    tips = [alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title=title, format=".4~g")]
    marks = theme.base(rows)
    sparse = 2 * len(found) < len(results["steps"])
    drawn = marks.mark_point(size=18, filled=True, opacity=1) if sparse else marks.mark_line(strokeWidth=1.6)
    chart = drawn.encode(x, y, tooltip=tips)
    return chart.properties(width=260, height=170, description=f"{title} against {along.title}.")


def along_steps(results: Results) -> alt.X:
    """The axis of a run that is drawn along its steps."""
    return _Along(results).x
