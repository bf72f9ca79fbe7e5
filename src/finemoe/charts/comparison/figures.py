"""The figures of a comparison: loss against tokens, FLOPs and seconds, final losses, pairs, the paper's, expert load.

Each function takes the `results` of `finemoe compare` and returns an altair chart, or None with nothing to show.
Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt

from finemoe.charts import theme
from finemoe.charts.comparison.records import (
    load_records,
    loss_window,
    mean_curves,
    paper_differences,
    spread,
    unit_for,
    visible,
)
from finemoe.charts.comparison.words import arm_names, by_loss, known_pairs, on_processor, stat
from finemoe.charts.numbers import Results, clean, finite, fixed

AnyChart = alt.LayerChart | alt.FacetChart  # altair's own annotation of `properties`
Against = Literal["tokens", "flops", "processor_seconds", "seconds"]
AXES: Mapping[Against, str] = {
    "tokens": "training tokens",
    "flops": "training compute",
    "processor_seconds": "processor time of training",
    "seconds": "wall-clock training time",
}
HEIGHT = 340
LOSS = "validation loss (nats per token)"


def figures(results: Results) -> dict[str, Any]:
    """Every figure that `results` can fill, by file name."""
    made: dict[str, Any] = {f"loss_{axis}": loss_curves(results, axis, hidden=False) for axis in axes_of(results)}
    made |= {"final_loss": final_losses(results), "pairs": pair_differences(results)}
    panels, heat = paper_panels(results), load_maps(results)
    made["paper"] = alt.hconcat(*(panel.properties(width=260) for panel in panels), spacing=36) if panels else None
    made["load"] = alt.vconcat(*heat.values(), spacing=28) if heat else None
    return {name: chart for name, chart in made.items() if chart is not None}


def axes_of(results: Results) -> dict[Against, str]:
    """What losses are drawn against: of the two times, the processor's where every arm recorded it."""
    left_out = "seconds" if on_processor(results) else "processor_seconds"
    return {axis: title for axis, title in AXES.items() if axis != left_out}


# ---- loss curves ----


def loss_curves(results: Results, against: Against, *, hidden: bool = True) -> AnyChart | None:
    """Mean loss over seeds against `against`, with the range of the seeds as a band and the names at the right.

    `hidden` keeps the steep start above the frame, for a reader who zooms out; a still picture draws slower for it.
    """
    results = clean(results)
    curves = mean_curves(results, against)
    window = loss_window(curves)
    if window is None:
        return None
    names = list(arm_names(results).values())
    size, unit = unit_for(max(point["x"] for points in curves.values() for point in points), against)
    shown = curves if hidden else {arm: visible(rows, window) for arm, rows in curves.items()}
    points = [point | {"x": point["x"] / size} for arm in shown.values() for point in arm]
    ends = _ends(points, window)
    y_scale = alt.Scale(domain=list(window), zero=False, nice=False)
    furthest = 1.012 * max(point["x"] for point in points)  # room for the last marker
    x_scale = alt.Scale(domain=[0, furthest], nice=False)
    x = alt.X("x:Q", title=f"{AXES[against]} ({unit})", scale=x_scale, axis=theme.FEW_TICKS)
    y = alt.Y("loss:Q", title=LOSS, scale=y_scale)
    color = theme.arm_color(names)
    # Ctrl with the wheel (a pinch is the same event) leaves plain scrolling to the page.
    zoom = alt.selection_interval(bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]")
    lines = theme.base(points)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("x:Q", title=unit, format=".4~g"),
        alt.Tooltip("loss:Q", format=".4f"),
        alt.Tooltip("low:Q", title="lowest seed", format=".4f"),
        alt.Tooltip("high:Q", title="highest seed", format=".4f"),
    ]
    band = lines.mark_area(opacity=0.18, clip=True).encode(x, alt.Y("low:Q", scale=y_scale), alt.Y2("high:Q"), color)
    mean = lines.mark_line(strokeWidth=2.2, clip=True).encode(x, y, color, theme.arm_dash(names)).add_params(zoom)
    hover = lines.mark_point(size=90, fillOpacity=0, strokeOpacity=0, opacity=1, filled=True, clip=True).encode(
        x, y, tooltip=tooltip
    )
    chart = alt.layer(band, mean, *_end_labels(ends, names, x, y_scale), hover)
    longest = max(len(end["arm"]) for end in ends)
    return chart.properties(
        width=theme.WIDTH - 8 * longest,
        height=HEIGHT,
        description=f"{LOSS} against {AXES[against]}. At the end: {_in_words(ends)}.",
    )


def _ends(points: Sequence[Mapping[str, Any]], window: tuple[float, float]) -> list[dict[str, Any]]:
    """The last point of each arm inside the window, and where its label goes without touching another."""
    last = {point["arm"]: dict(point) for point in points}
    ends = [end for end in last.values() if window[0] <= end["loss"] <= window[1]] or list(last.values())
    gap = 15 * (window[1] - window[0]) / HEIGHT
    labels = spread([end["loss"] for end in ends], gap, window)
    return [end | {"label": label} for end, label in zip(ends, labels, strict=True)]


def _end_labels(ends: Sequence[Mapping[str, Any]], names: Sequence[str], x: alt.X, y_scale: alt.Scale) -> list[Any]:
    marks = theme.base(ends)
    color, right = theme.arm_color(names), alt.value("width")
    label_y = alt.Y("label:Q", scale=y_scale)
    # Marks outside the frame must say clip=False, for scales bound to a selection clip by default. Zoomed out of
    # sight, such a label would float over the page: it goes when its place leaves the axis.
    inside = "datum.label >= domain('y')[0] && datum.label <= domain('y')[1]"
    opacity = alt.condition(inside, alt.value(1), alt.value(0))
    level = alt.Y("loss:Q", scale=y_scale)
    reach = marks.mark_rule(strokeWidth=1, opacity=0.55, clip=True).encode(x, level, x2=right, color=color)
    leader = marks.mark_rule(strokeWidth=1, clip=False).encode(
        x=right, x2=alt.value(alt.expr("width + 12")), y=level, y2="label:Q", color=color, opacity=opacity
    )
    dot = marks.mark_point(size=64, filled=True, opacity=1, clip=True).encode(x, level, color, theme.arm_shape(names))
    text = marks.mark_text(align="left", baseline="middle", clip=False).encode(
        x=alt.value(alt.expr("width + 16")), y=label_y, text="arm:N", opacity=opacity
    )
    return [reach, leader, dot, text]


def _in_words(ends: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{end['arm']} {fixed(end['loss'])}" for end in sorted(ends, key=lambda end: end["loss"]))


# ---- final losses and pairs ----


def final_losses(results: Results) -> AnyChart | None:
    """Final loss of each arm, best on top: marker at the mean, bar for the interval, small ticks for the seeds."""
    results = clean(results)
    names, order = arm_names(results), by_loss(results)
    if not order:
        return None
    rows, seeds = [], []
    for arm in order:
        value = stat(results["arms"][arm], "validation_loss")
        shown = {"arm": names[arm], "loss": value["mean"], "low": value.get("low"), "high": value.get("high")}
        rows.append(shown | {"text": fixed(value["mean"])})
        seeds += [{"arm": names[arm], "loss": seed} for seed in value.get("seeds") or [] if seed is not None]
    numbers = [row[key] for row in [*rows, *seeds] for key in ("loss", "low", "high") if row.get(key) is not None]
    pad = 0.08 * (max(numbers) - min(numbers)) or 0.05
    x_scale = alt.Scale(domain=[min(numbers) - pad, max(numbers) + pad], nice=False)
    x = alt.X("loss:Q", title=LOSS, scale=x_scale, axis=theme.FEW_TICKS)
    y = _rows([names[arm] for arm in order])
    color = theme.arm_color(list(names.values()))
    marks = theme.base(rows)
    tooltip = [
        alt.Tooltip("arm:N"),
        alt.Tooltip("loss:Q", title="mean", format=".4f"),
        alt.Tooltip("low:Q", format=".4f"),
        alt.Tooltip("high:Q", format=".4f"),
    ]
    low = alt.X("low:Q", title=LOSS, scale=x_scale)
    bar = marks.mark_rule(strokeWidth=2.4).encode(low, y, alt.X2("high:Q"), color)
    bar = bar.transform_filter("datum.low !== null")
    each = theme.base(seeds).mark_tick(thickness=1.5, size=13, opacity=0.65).encode(x, y, color)
    dot = marks.mark_point(size=80, filled=True, opacity=1).encode(
        x, y, color, theme.arm_shape(list(names.values())), tooltip=tooltip
    )
    text = marks.mark_text(dy=-13).encode(x, y, text="text:N")
    return alt.layer(bar, each, dot, text).properties(
        width=theme.WIDTH - 120,
        height=alt.Step(38),
        description=f"Final {LOSS}: " + ", ".join(f"{row['arm']} {row['text']}" for row in rows) + ".",
    )


def _rows(names: Sequence[str]) -> alt.Y:
    """A row for each arm, with room for a number above the first."""
    # A band, said aloud: with rules in the chart Vega-Lite picks one, without them points, and two panels differ.
    scale = alt.Scale(type="band", domain=list(names), paddingInner=0, paddingOuter=0.2)
    return alt.Y("arm:N", title=None, scale=scale, axis=alt.Axis(grid=True, ticks=False, domain=False, labelLimit=170))


def pair_differences(results: Results) -> AnyChart | None:
    """Difference in loss of each tested pair with its interval. Filled markers are decided, hollow ones are not."""
    results = clean(results)
    names = arm_names(results)
    rows = []
    for pair in known_pairs(results):
        if finite(pair.get("difference")) is None:
            continue
        decided = pair.get("verdict") in ("better", "worse")
        rows.append({
            "pair": f"{names[pair['a']]} − {names[pair['b']]}", "difference": pair["difference"],
            "low": pair.get("low"), "high": pair.get("high"), "decided": "decided" if decided else "undecided",
            "text": f"{names[pair['a']]} − {names[pair['b']]}: {fixed(pair['difference'])}",
        })  # fmt: skip
    if not rows:
        return None
    title = "difference in validation loss (nats per token)"
    x = alt.X("difference:Q", title=title, scale=alt.Scale(zero=True), axis=theme.FEW_TICKS)
    y = alt.Y("pair:N", title=None, axis=None, scale=alt.Scale(domain=[row["pair"] for row in rows]))
    marks = theme.base(rows)
    # A piece of the zero line in each row: a whole one would run through the names.
    zero = marks.mark_tick(thickness=1.5, size=20, yOffset=8, opacity=0.6).encode(x=alt.datum(0), y=y)
    low = alt.X("low:Q", scale=alt.Scale(zero=True), title=title)
    bar = marks.mark_rule(strokeWidth=2.4, yOffset=8).encode(low, y, alt.X2("high:Q"))
    bar = bar.transform_filter("datum.low !== null")
    tooltip = [
        alt.Tooltip("pair:N"),
        *(alt.Tooltip(f"{k}:Q", format=".4f") for k in ("difference", "low", "high")),
    ]
    dots = theme.decided_dots(marks, x, y, tooltip=tooltip)
    text = marks.mark_text(align="left", dy=-9).encode(y, x=alt.value(2), text="text:N")
    return alt.layer(zero, bar, *dots, text).properties(
        width=theme.WIDTH - 20,
        height=alt.Step(38),
        description=f"Paired {title}: " + "; ".join(f"{row['text']}, {row['decided']}" for row in rows) + ".",
    )


# ---- the paper's figures beside ours ----


def paper_panels(results: Results) -> list[AnyChart]:
    """Two panels with one row an arm: the paper's Pile loss, and our loss, each as difference from the same baseline.

    Empty unless at least two arms name a figure of the paper (DeepSeekMoE, arXiv 2401.06066, Tables 1 and 8).
    """
    results = clean(results)
    baseline, rows = paper_differences(results)
    if not rows:
        return []
    names = list(arm_names(results).values())
    order = [row["arm"] for row in sorted(rows, key=lambda row: row["paper"])]
    reaches = {"paper": ("paper",), "ours": ("ours", "low", "high")}
    panels = []
    for field, title in (("paper", "The paper: Pile test loss"), ("ours", "This run: validation loss")):
        minus = f"nats per token, minus {baseline}"
        reached = [0.0, *(row[key] for row in rows for key in reaches[field] if row[key] is not None)]
        pad = 0.1 * (max(reached) - min(reached)) or 0.05  # room for the numbers over the outermost markers
        scale = alt.Scale(domain=[min(reached) - pad, max(reached) + pad], nice=False)
        x = alt.X(f"{field}:Q", title=minus, scale=scale, axis=theme.FEW_TICKS)
        y = _rows(order)
        marks = theme.base(rows)
        color = theme.arm_color(names)
        zero = theme.base([{field: 0}]).mark_rule(strokeDash=[4, 3]).encode(x)
        dot = marks.mark_point(size=80, filled=True, opacity=1).encode(x, y, color, theme.arm_shape(names))
        text = marks.mark_text(dy=-13).encode(x, y, text=alt.Text(f"{field}:Q", format="+.3f"))
        layers = [zero, dot, text]
        if field == "ours":
            low = alt.X("low:Q", scale=scale, title=minus)
            bar = marks.mark_rule(strokeWidth=2.4).encode(low, y, alt.X2("high:Q"), color)
            layers.insert(1, bar.transform_filter("datum.low !== null"))
        said = ", ".join(f"{row['arm']} {row[field]:+.3f}" for row in rows)
        panel = alt.layer(*layers).properties(title=title, width=320, height=alt.Step(38))
        panels.append(panel.properties(description=f"{title}, difference from {baseline}: {said}."))
    return panels


# ---- expert load ----


def load_maps(results: Results) -> dict[str, alt.Chart]:
    """Arm -> layer x expert map of load relative to uniform; one colour scale for all arms, the first shows it."""
    results = clean(results)
    names = arm_names(results)
    records = {arm: load_records(record.get("load")) for arm, record in results["arms"].items()}
    records = {arm: rows for arm, rows in records.items() if rows}
    hottest = max((row["relative"] for rows in records.values() for row in rows), default=1.0)
    top = min(max(2.0, hottest), theme.HOTTEST)
    maps: dict[str, alt.Chart] = {}
    for arm, rows in records.items():
        layers = len({row["layer"] for row in rows})
        experts = max(row["expert"] for row in rows) + 1
        title = "load ÷ uniform load" + (f" (last colour: {theme.HOTTEST:g} or more)" if hottest > top else "")
        axis = alt.Axis(labelAngle=0, values=theme.expert_ticks(experts), labelOverlap=True)
        maps[arm] = (
            theme.base(rows)
            .mark_rect()
            .encode(
                alt.X("expert:O", title="routed expert", axis=axis, scale=alt.Scale(paddingInner=0.06)),
                alt.Y(
                    "layer:O",
                    title="layer",
                    axis=alt.Axis(labelOverlap=True),
                    scale=alt.Scale(paddingInner=0.06),
                ),
                theme.load_color("relative:Q", top, title, legend=not maps),
                tooltip=[
                    alt.Tooltip("layer:O"),
                    alt.Tooltip("expert:O"),
                    alt.Tooltip("fraction:Q", title="share of the load", format=".2%"),
                    alt.Tooltip("relative:Q", title="÷ uniform", format=".2f"),
                ],
            )
            .properties(
                title=names[arm],
                width=theme.WIDTH - 60,
                height=alt.Step(22 if layers <= 12 else 12),
                description=f"{names[arm]}: load of {experts} routed experts in {layers} MoE layers, "
                f"between {fixed(min(r['relative'] for r in rows), 2)} and "
                f"{fixed(max(r['relative'] for r in rows), 2)} times uniform.",
            )
        )
    return maps
