"""The figures of `finemoe analyze experts`: specialisation, stability, and what each expert takes of each domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results, clean, fixed


def figures(results: Results) -> dict[str, Any]:
    """Every figure, by file name: a heat map for each layer, specialisation by layer, overlap over training."""
    results = clean(results)
    made: dict[str, Any] = {f"domains_layer_{layer}": chart for layer, chart in domain_maps(results).items()}
    made |= {"specialization": specialization_chart(results), "stability": stability_chart(results)}
    return {name: chart for name, chart in made.items() if chart is not None}


def specialization_chart(results: Results) -> Any | None:
    """A small mark for each expert and a large one for the mean of its layer."""
    rows = [
        {
            "layer": card["layer"],
            "specialization": card["specialization"],
            "expert": f"L{card['layer']} E{card['expert']}",
        }
        for card in results["cards"]
        if card["specialization"] is not None
    ]
    if not rows:
        return None
    means = [{"layer": each["layer"], "specialization": each["specialization"]} for each in results["layers"]]
    # To the next tenth: on a scale to 1 the experts of most models would stand on one another.
    furthest = math.ceil(10 * max(0.1, *(row["specialization"] for row in rows))) / 10
    x = alt.X(
        "specialization:Q",
        title="specialisation (could be 0 to 1)",
        scale=alt.Scale(domain=[0, furthest]),
        axis=alt.Axis(tickCount=6),
    )
    y = alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True))
    tips = [alt.Tooltip("expert:N"), alt.Tooltip("specialization:Q", format=".3f")]
    each = theme.base(rows).mark_tick(thickness=1.5, size=14, opacity=0.55).encode(x, y, tooltip=tips)
    mean = theme.base(means).mark_point(size=110, filled=True, opacity=1, shape="diamond").encode(
        x, y, color=alt.value("#db7e00"),
        tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("specialization:Q", title="mean", format=".3f")],
    )  # fmt: skip
    said = ", ".join(f"layer {row['layer']} {fixed(row['specialization'], 2)}" for row in means)
    return alt.layer(each, mean).properties(
        width=theme.WIDTH - 60,
        height=alt.Step(26 if len(means) <= 12 else 16),
        description=f"Specialisation of each expert (ticks) and mean of the layer (diamond): {said}.",
    )


def stability_chart(results: Results) -> Any | None:
    """Mean overlap with the last checkpoint, by step, one line a layer."""
    rows = [
        {"layer": each["layer"], "step": found["step"], "overlap": found["overlap"], "arm": f"layer {each['layer']}"}
        for each in results["layers"]
        for found in each["stability"]
    ]
    if not rows:
        return None
    last = {row["arm"]: row for row in rows}
    x = alt.X("step:Q", title="training step", scale=alt.Scale(zero=False, nice=False), axis=alt.Axis(tickCount=6))
    y = alt.Y("overlap:Q", title="mean overlap with the last checkpoint", scale=alt.Scale(domain=[0, 1]))
    tips = [alt.Tooltip("arm:N", title="layer"), alt.Tooltip("step:Q"), alt.Tooltip("overlap:Q", format=".3f")]
    if len(last) > 8:  # more lines than colours: one colour from the first layer to the last
        color: Any = alt.Color("layer:Q", title="layer", scale=alt.Scale(scheme="viridis"))
        chart: Any = theme.base(rows).mark_line(point=True).encode(x, y, color, detail="arm:N", tooltip=tips)
    else:
        names = list(last)
        shown, legend = theme.base(rows), alt.Legend(orient="top", columns=4)
        color = alt.Color("arm:N", title=None, scale=alt.Scale(domain=names), legend=legend)
        shapes = alt.Scale(domain=names, range=theme.arm_shapes(len(names)))
        dashes = alt.Scale(domain=names, range=theme.arm_dashes(len(names)))
        dash = alt.StrokeDash("arm:N", title=None, scale=dashes, legend=legend)
        line = shown.mark_line(strokeWidth=2).encode(x, y, color, dash)
        dots = shown.mark_point(size=70, filled=True, opacity=1).encode(
            x, y, color, alt.Shape("arm:N", title=None, scale=shapes, legend=legend), tooltip=tips
        )
        chart = alt.layer(line, dots)
    said = ", ".join(f"{row['arm']} {fixed(row['overlap'], 2)} at step {row['step']}" for row in last.values())
    return chart.properties(
        width=theme.WIDTH - 60, height=240, description=f"Mean overlap with the last checkpoint: {said}."
    )


def domain_maps(results: Results) -> dict[int, Any]:
    """Layer -> map of domain by expert; colour is the lift. None where there is one domain."""
    if len(results["domains"]) < 2:
        return {}
    rows: dict[int, list[dict[str, Any]]] = {}
    for card in results["cards"]:
        rows.setdefault(card["layer"], []).extend(
            {"expert": card["expert"], **each} for each in card["domains"] if card["assignments"]
        )
    top = min(theme.HOTTEST, max([2.0, *(row["lift"] for found in rows.values() for row in found)]))
    return {layer: _map(layer, found, top) for layer, found in rows.items()}


def _map(layer: int, rows: Sequence[Mapping[str, Any]], top: float) -> Any:
    experts = max((row["expert"] for row in rows), default=0) + 1
    axis = alt.Axis(labelAngle=0, values=theme.expert_ticks(experts), labelOverlap="parity", labelSeparation=5)
    title = "lift"
    if max((row["lift"] for row in rows), default=0.0) > top:
        title += f" (last colour: {top:g} or more)"
    tips = [alt.Tooltip("domain:N"), alt.Tooltip("expert:O"), alt.Tooltip("lift:Q", format=".2f"),
            alt.Tooltip("share:Q", title="share of the expert's tokens", format=".1%"),
            alt.Tooltip("rate:Q", title="share of the domain's tokens", format=".1%")]  # fmt: skip
    chart = theme.base(rows).mark_rect().encode(
        alt.X("expert:O", title="routed expert", axis=axis, scale=alt.Scale(paddingInner=0.06)),
        alt.Y("domain:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.06), axis=alt.Axis(labelLimit=130)),
        theme.load_color("lift:Q", top, title),
        tooltip=tips,
    )  # fmt: skip
    sharpest = max(rows, key=lambda row: row["lift"], default=None)
    said = "" if sharpest is None else (
        f" Highest: expert {sharpest['expert']} on {sharpest['domain']}, {fixed(sharpest['lift'], 2)}."
    )  # fmt: skip
    return chart.properties(
        title=f"Layer {layer}",
        width=theme.WIDTH - 110,
        height=alt.Step(24),
        description=f"Layer {layer}: lift of each domain in each of {experts} experts.{said}",
    )
