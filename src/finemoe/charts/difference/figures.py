"""Figures of `finemoe analyze difference`: flips by layer and domain, where they come from, load, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.difference.words import percent
from finemoe.charts.numbers import Results, clean, fixed

CAUSES = {
    "flip_rate": "everything",
    "flip_rate_router": "only the router",
    "flip_rate_states": "only the states",
}
_PERCENT = alt.Axis(format="%", tickCount=6, labelOverlap="parity", labelSeparation=8)
MOST_MARKERS = 6
"""Domains that can be told apart by their markers; more of them get a map."""
FLIPPED = "#c8681f"
_MOST_NUMBERS = 14  # layers whose cells have room for a number
_LOADS = 1.0  # a change by the whole uniform load has the last colour


def figures(results: Results) -> dict[str, Any]:
    """Every figure, by file name."""
    results = clean(results)
    made = {
        "flips": flip_chart(results),
        "causes": cause_chart(results),
        "load_change": load_chart(results),
        "loss": loss_chart(results),
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def flip_chart(results: Results) -> Any:
    """Share of choices that changed: a marker for each domain, a bar for the interval over all text."""
    domains = _domains(results)
    if len(domains) > MOST_MARKERS:
        return _flip_map(results, domains)
    rows, whole = [], []
    for each in results["layers"]:
        for name in domains:
            flip = each["domains"][name]
            rows.append({"layer": each["layer"], "arm": name, "flip": flip["flip_rate"]["mean"],
                         "any": flip["any_change"], "first": flip["top1_flip_rate"]})  # fmt: skip
        found = each["domains"]["all"]["flip_rate"]
        whole.append({"layer": each["layer"], "flip": found["mean"], "low": found["low"], "high": found["high"]})
    x, y = _x("flip:Q"), _layers(results)
    tips = [alt.Tooltip("arm:N", title="domain"), alt.Tooltip("layer:O"),
            alt.Tooltip("flip:Q", title="choices changed", format=".1%"),
            alt.Tooltip("any:Q", title="tokens with any change", format=".1%"),
            alt.Tooltip("first:Q", title="first choice changed", format=".1%")]  # fmt: skip
    dots = theme.base(rows).mark_point(size=75, filled=True, opacity=1)
    layers: list[Any] = [dots.encode(x, y, *_identity(domains), tooltip=tips)]
    if len(domains) > 1:
        mean = theme.base(whole).mark_tick(thickness=2.5, size=22).encode(x, y)
        bar = theme.base(whole).mark_rule(strokeWidth=2.4).encode(_x("low:Q"), y, alt.X2("high:Q"))
        layers = [bar.transform_filter("datum.low !== null"), mean, *layers]
    said = ", ".join(f"layer {row['layer']} {percent(row['flip'])}" for row in whole)
    return _wide(alt.layer(*layers), results, f"Choices of experts that changed: {said}.")


def _flip_map(results: Results, domains: Sequence[str]) -> Any:
    """The same for many domains: a cell for each of them and each layer, the most changed on top."""
    rows = [
        {"layer": str(each["layer"]), "domain": name, "flip": each["domains"][name]["flip_rate"]["mean"]}
        for each in results["layers"]
        for name in ("all", *domains)
    ]  # fmt: skip
    means = {name: sum(row["flip"] or 0.0 for row in rows if row["domain"] == name) for name in domains}
    order = ["all", *sorted(domains, key=lambda name: -means[name])]
    layers = [str(each["layer"]) for each in results["layers"]]
    x = alt.X("layer:N", title="layer", sort=layers, axis=alt.Axis(labelAngle=0, labelOverlap=True, orient="top"))
    y = alt.Y("domain:N", title=None, sort=order, axis=alt.Axis(labelLimit=150))
    tips = [alt.Tooltip("domain:N"), alt.Tooltip("layer:N"), alt.Tooltip("flip:Q", format=".1%")]
    cells = theme.base(rows).mark_rect(color=FLIPPED).encode(
        x, y, alt.Opacity("flip:Q", title="choices changed", scale=alt.Scale(domainMin=0, range=[0, 0.6]),
                          legend=None), tooltip=tips,
    )  # fmt: skip
    charts = [cells]
    if len(layers) <= _MOST_NUMBERS:
        charts.append(theme.base(rows).mark_text().encode(x, y, text=alt.Text("flip:Q", format=".0%"), tooltip=tips))
    said = ", ".join(f"{name} {percent(means[name] / len(layers))}" for name in order[1:4])
    return alt.layer(*charts).properties(
        width=theme.WIDTH - 120, height=alt.Step(22),
        description=f"Choices of experts that changed, by domain and layer; the most changed: {said}.",
    )  # fmt: skip


def cause_chart(results: Results) -> Any:
    """What part of the flips the router's own change makes, and what part the change of what it reads."""
    rows = [
        {"layer": each["layer"], "arm": name,
         "flip": value["mean"] if isinstance(value := each["domains"]["all"][key], Mapping) else value}
        for each in results["layers"]
        for key, name in CAUSES.items()
    ]  # fmt: skip
    x, y = _x("flip:Q"), _layers(results)
    tips = [alt.Tooltip("arm:N", title="when"), alt.Tooltip("layer:O"), alt.Tooltip("flip:Q", format=".1%")]
    dots = theme.base(rows).mark_point(size=85, filled=True, opacity=1)
    chart = dots.encode(x, y, *_identity(list(CAUSES.values())), tooltip=tips)
    said = ", ".join(f"layer {row['layer']}, {row['arm']}: {percent(row['flip'])}" for row in rows[:6])
    return _wide(chart, results, f"Choices of experts that changed with a part of the second model: {said}.")


def load_chart(results: Results) -> Any:
    """Layer x expert: load after less load before, in parts of the uniform load."""
    rows = [
        {"layer": each["layer"], "expert": each["expert"], "change": each["load_b"] - each["load_a"],
         "before": each["load_a"], "after": each["load_b"], "verdict": each["verdict"],
         "certain": theme.CERTAIN[each["verdict"] not in ("gained", "lost", "removed")]}
        for each in results["experts"]
    ]  # fmt: skip
    experts = max(row["expert"] for row in rows) + 1
    axis = alt.Axis(labelAngle=0, values=theme.expert_ticks(experts), labelOverlap="parity", labelSeparation=5)
    largest = max(abs(row["change"]) for row in rows)
    top = min(_LOADS, max(0.1, largest))
    title = "change of load ÷ uniform load" + (f" (last colours: {top:g} or more)" if largest > top else "")
    scale = alt.Scale(domain=[-top, top], domainMid=0, clamp=True, interpolate="lab")
    chart = theme.base(rows).mark_rect().encode(
        alt.X("expert:O", title="routed expert", axis=axis, scale=alt.Scale(paddingInner=0.06)),
        alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True), scale=alt.Scale(paddingInner=0.06)),
        alt.Color("change:Q", scale=scale, legend=alt.Legend(title=title, orient="top", gradientLength=220)),
        theme.fade(),
        tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("expert:O"),
                 *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("before", "after", "change")),
                 alt.Tooltip("verdict:N")],
    )  # fmt: skip
    most = max(rows, key=lambda row: abs(row["change"]))
    said = (
        f"Largest change: expert {most['expert']} of layer {most['layer']}, {fixed(most['change'], 2)} times uniform."
    )
    return _wide(chart, results, f"Change of each expert's load, in parts of the uniform load. {said}")


def loss_chart(results: Results) -> Any:
    """Loss of the second less that of the first, by domain, with intervals."""
    rows = [{"domain": each["domain"], **each["difference"]} for each in results["domains"]]
    if len(rows) == 2:
        rows = rows[1:]  # one domain is all there is
    title = "loss after − before (nats per token)"
    scale = alt.Scale(zero=True)
    y = alt.Y("domain:N", title=None, sort=None, axis=alt.Axis(labelLimit=150))
    marks = theme.base(rows)
    tips = [alt.Tooltip("domain:N"), *(alt.Tooltip(f"{key}:Q", format=".4f") for key in ("mean", "low", "high"))]
    axis = alt.Axis(tickCount=6, labelOverlap="parity", labelSeparation=8)
    bar = marks.mark_rule(strokeWidth=2.4).encode(
        alt.X("low:Q", title=title, scale=scale, axis=axis), y, alt.X2("high:Q")
    )
    dot = marks.mark_point(size=85, filled=True, opacity=1).encode(
        alt.X("mean:Q", title=title, scale=scale, axis=axis), y, tooltip=tips
    )
    zero = theme.base([{"zero": 0}]).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q")
    said = ", ".join(f"{row['domain']} {fixed(row['mean'])}" for row in rows)
    chart = alt.layer(zero, bar.transform_filter("datum.low !== null"), dot)
    return chart.properties(
        width=theme.WIDTH - 110, height=alt.Step(30), description=f"Difference in loss, nats per token: {said}."
    )


def _domains(results: Results) -> list[str]:
    return [each["domain"] for each in results["domains"][1:]]


def _x(field: str) -> alt.X:
    return alt.X(field, title="choices that changed (of the first model's)", scale=alt.Scale(zero=True), axis=_PERCENT)


def _layers(results: Results) -> alt.Y:
    scale = alt.Scale(type="band", domain=[each["layer"] for each in results["layers"]])
    return alt.Y("layer:O", title="layer", scale=scale, axis=alt.Axis(labelOverlap=True, grid=True))


def _identity(names: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Colour and marker by the field `arm`, with one legend for both."""
    columns = max(1, 42 // (max(map(len, names)) + 4))  # as many as a phone has room for
    legend = alt.Legend(orient="top", columns=columns, labelLimit=220)
    shapes = alt.Scale(domain=list(names), range=theme.arm_shapes(len(names)))
    color = alt.Color("arm:N", title=None, scale=alt.Scale(domain=list(names)), legend=legend)
    return color, alt.Shape("arm:N", title=None, scale=shapes, legend=legend)


def _wide(chart: Any, results: Results, description: str) -> Any:
    step = alt.Step(30 if len(results["layers"]) <= 12 else 18)
    return chart.properties(width=theme.WIDTH - 60, height=step, description=description)
