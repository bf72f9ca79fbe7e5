"""The figures of `finemoe analyze load`: load by layer and expert, over training, by domain, and pairs of experts.

Each function takes the results of that verb and returns charts, or None where there is nothing to show. Load is always
drawn relative to an even share, on one scale of colours for all charts of a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results, finite, fixed

MOST_LAYERS = 12
"""Layers that get a chart each; more are thinned evenly."""
_MOST_CELLS = 60_000  # of the movie: frames are thinned, for a page that opens at once
_LIFT = 4.0  # pairs met four times as often as by chance, or a quarter as often, have the last colours
_EVENNESS = (("max_vio", "MaxVio"), ("entropy", "entropy of the load (1 is even)"), ("dead", "dead experts, per layer"))


def figures(results: Results) -> dict[str, Any]:
    """Every figure by file name, for paper: no sliders."""
    frames = frames_of(results)
    last = heat_map(results, frames[-1:], slider=False)
    made: dict[str, Any] = {"load": last.properties(width=theme.WIDTH - 60)}
    over, domains, lifts = over_training(results), domain_maps(results), lift_maps(results)
    curves = evenness(results)
    if over:
        made["load_over_training"] = alt.hconcat(*(c.properties(width=260) for c in over[:3]), spacing=30)
    if curves:
        made["evenness"] = alt.hconcat(*(c.properties(width=220) for c in curves), spacing=36)
    if domains:
        made["domains"] = alt.vconcat(*(c.properties(width=theme.WIDTH - 100) for c in domains), spacing=20)
    if lifts:
        made["together"] = alt.hconcat(*(c.properties(width=300) for c in lifts[:3]), spacing=30)
    return made


def frames_of(results: Results) -> list[dict[str, Any]]:
    """The states to show one after the other, each `name`, `step` and `layers`.

    Those of the series; where that is a single model of a run, what its validations recorded, and then the model.
    """
    series = _series(results)
    return series if len(series) > 1 else [*_recorded(results), *series]


def _series(results: Results) -> list[dict[str, Any]]:
    return [{"name": one["name"], "step": one["step"], "layers": one["layers"]} for one in results["series"]]


def _recorded(results: Results) -> list[dict[str, Any]]:
    return [
        {"name": f"step {one['step']}, validation", "step": one["step"], "layers": one["layers"]}
        for one in results["history"]
    ]


def _in_training(results: Results) -> list[dict[str, Any]]:
    """The longer of what validations recorded and the series, where that is one training of one model."""
    own = _series(results)
    steps = [frame["step"] for frame in own]
    shapes = {tuple((n, len(layer["load"])) for n, layer in frame["layers"].items()) for frame in own}
    if None in steps or steps != sorted(set(steps)) or len(shapes) > 1:
        own = []
    return max((_recorded(results), own), key=len)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `items`, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)] if most > 1 else [items[-1]]


# ---- load by layer and expert ----


def heat_map(results: Results, frames: Sequence[Mapping[str, Any]], *, slider: bool) -> Any:
    """Layer by expert, one frame at a time: the last, or what the slider says."""
    cells = sum(len(layer["load"]) for layer in frames[-1]["layers"].values())
    shown = thinned(frames, max(2, _MOST_CELLS // cells)) if slider else frames[-1:]
    rows = [row | {"frame": number} for number, frame in enumerate(shown) for row in _cells(frame["layers"])]
    experts = max(row["expert"] for row in rows) + 1
    layers = len(shown[-1]["layers"])
    names = [frame["name"] for frame in shown]
    said = f"Load of {experts} routed experts in {layers} MoE layers relative to an even share, at {names[-1]}."
    chart = (
        theme.base(rows)
        .mark_rect()
        .encode(
            _expert_axis(alt.X, experts),
            alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True), scale=_BANDS),
            _load_color(_top(results)),
            tooltip=_TOOLTIP,
        )
        .properties(height=alt.Step(22 if layers <= 12 else 12), description=said)
    )
    if not slider or len(shown) < 2:
        return chart.properties(title=names[-1])
    frame = alt.param(
        name="frame", value=len(shown) - 1, bind=alt.binding_range(min=0, max=len(shown) - 1, step=1, name="moment ")
    )
    title = alt.Title(text=alt.expr(f"{_strings(names)}[frame]"))
    return chart.add_params(frame).transform_filter("datum.frame == frame").properties(title=title)


def over_training(results: Results) -> list[Any]:
    """For each layer, expert by moment: every expert's fate in one picture. Empty without at least three moments."""
    frames = thinned(_in_training(results), 60)
    if len(frames) < 3:
        return []
    charts = []
    for number in thinned(list(frames[-1]["layers"]), MOST_LAYERS):
        rows = [row | {"step": frame["step"]} for frame in frames for row in _cells({number: frame["layers"][number]})]
        experts = len(frames[-1]["layers"][number]["load"])
        charts.append(
            theme.base(rows)
            .mark_rect()
            .encode(
                alt.X("step:O", title="training step", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
                _expert_axis(alt.Y, experts),
                _load_color(_top(results)),
                tooltip=[alt.Tooltip("step:O"), *_TOOLTIP],
            )
            .properties(
                title=f"Layer {number}",
                height=alt.Step(max(2.0, min(9.0, 420 / experts))),
                description=f"Layer {number}: load of {experts} experts relative to an even share, from step "
                f"{frames[0]['step']} to {frames[-1]['step']}.",
            )
        )
    return charts


def domain_maps(results: Results) -> list[Any]:
    """For each layer, domain by expert, of the last model. Empty with one domain."""
    layers = results["series"][-1]["layers"]
    charts: list[Any] = []
    for number in thinned(list(layers), MOST_LAYERS):
        domains = layers[number]["domains"]
        if len(domains) < 2:
            return []
        rows = [row | {"domain": d} for d, one in domains.items() for row in _cells({number: one})]
        experts = layers[number]["experts"]
        charts.append(
            theme.base(rows)
            .mark_rect()
            .encode(
                _expert_axis(alt.X, experts),
                alt.Y("domain:N", title=None, sort=list(domains), axis=alt.Axis(labelLimit=110), scale=_BANDS),
                _load_color(_top(results)),
                tooltip=[alt.Tooltip("domain:N"), *_TOOLTIP],
            )
            .properties(
                title=f"Layer {number}",
                height=alt.Step(24),
                description=f"Layer {number}: load of {experts} experts on {len(domains)} domains.",
            )
        )
    return charts


_BANDS = alt.Scale(paddingInner=0.06)
_TOOLTIP = [
    alt.Tooltip("layer:O"),
    alt.Tooltip("expert:O"),
    alt.Tooltip("share:Q", title="share of the load", format=".2%"),
    alt.Tooltip("relative:Q", title="÷ even share", format=".2f"),
]


def _cells(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for number, layer in layers.items():
        total = sum(layer["load"]) or 1
        for expert, count in enumerate(layer["load"]):
            share = count / total
            relative = round(share * len(layer["load"]), 4)
            rows.append({"layer": int(number), "expert": expert, "share": round(share, 6), "relative": relative})
    return rows


def _top(results: Results) -> float:
    hottest = max(1 + layer["max_vio"] for frame in frames_of(results) for layer in frame["layers"].values())
    return min(max(2.0, math.ceil(hottest)), theme.HOTTEST)


def _load_color(top: float) -> alt.Color:
    title = "load ÷ even share" + (f" (last colour: ≥ {top:g})" if top >= theme.HOTTEST else "")
    return theme.load_color("relative:Q", top, title, length=200)


def _expert_axis(channel: Any, experts: int) -> Any:
    axis = alt.Axis(labelAngle=0, values=theme.expert_ticks(experts), labelOverlap=True)
    return channel("expert:O", title="routed expert", axis=axis)


def _strings(names: Sequence[str]) -> str:
    """A Vega expression: names are untrusted, and a string there is JSON's but for what ends a line."""
    quoted = ("'" + "".join(c if c.isalnum() or c in " ,.-_" else "�" for c in name) + "'" for name in names)
    return f"[{', '.join(quoted)}]"


# ---- how even, over training ----


def evenness(results: Results) -> list[Any]:
    """MaxVio, entropy and dead experts against the step: mean of the layers, and their lowest to highest as a band."""
    frames = _in_training(results)
    if len(frames) < 3:
        return []
    charts = []
    for key, title in _EVENNESS:
        rows = []
        for frame in frames:
            values = [layer[key] for layer in frame["layers"].values()]
            middle = sum(values) / len(values)
            rows.append({"step": frame["step"], "mean": middle, "low": min(values), "high": max(values)})
        marks = theme.base(rows)
        x = alt.X("step:Q", title="training step", axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=False))
        scale = alt.Scale(domain=[0, 1]) if key == "entropy" else alt.Scale(zero=True, nice=True)
        y = alt.Y("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5))
        tooltip = [alt.Tooltip("step:Q"), *(alt.Tooltip(f"{name}:Q", format=".3f") for name in ("mean", "low", "high"))]
        band = marks.mark_area(opacity=0.18).encode(x, alt.Y("low:Q", scale=scale, title=title), alt.Y2("high:Q"))
        line = marks.mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=36)).encode(x, y, tooltip=tooltip)
        ends = f"{fixed(rows[0]['mean'], 2)} at step {rows[0]['step']}, {fixed(rows[-1]['mean'], 2)} at the end"
        charts.append(alt.layer(band, line).properties(height=220, description=f"{title}: {ends}."))
    return charts


# ---- pairs ----


def lift_maps(results: Results) -> list[Any]:
    """For each layer, how often two experts are chosen together, over chance, on a logarithmic scale of colours."""
    charts: list[Any] = []
    for number in thinned(list(results["lift"]), MOST_LAYERS):
        matrix = results["lift"][number]
        rows = [
            {"a": a, "b": b, "lift": lift, "log": round(max(-2.0, math.log2(max(lift, 2.0**-9))), 3)}
            for a, row in enumerate(matrix)
            for b, value in enumerate(row)
            if a != b and (lift := finite(value)) is not None
        ]
        if not rows:
            continue
        reach = math.log2(_LIFT)
        scale = alt.Scale(domain=[-reach, reach], domainMid=0, clamp=True, interpolate="lab")
        legend = alt.Legend(
            title="together ÷ chance", orient="top", gradientLength=200,
            values=[-2, -1, 0, 1, 2], labelExpr="pow(2, datum.value) < 1 ? '1/' + pow(2, -datum.value) : "
            "'' + pow(2, datum.value)",
        )  # fmt: skip
        every = next(step for step in (1, 2, 4, 8) if len(matrix) <= 9 * step or step == 8)
        axis = alt.Axis(labelAngle=0, values=list(range(0, len(matrix), every)), labelOverlap=True)
        charts.append(
            theme.base(rows)
            .mark_rect()
            .encode(
                alt.X("a:O", title="routed expert", axis=axis),
                alt.Y("b:O", title="routed expert", axis=axis),
                alt.Color("log:Q", scale=scale, legend=legend),
                tooltip=[alt.Tooltip("a:O"), alt.Tooltip("b:O"), alt.Tooltip("lift:Q", title="÷ chance", format=".2f")],
            )
            .properties(
                title=f"Layer {number}",
                height=320,
                description=f"Layer {number}: how often each two of {len(matrix)} experts are chosen together.",
            )
        )
    return charts
