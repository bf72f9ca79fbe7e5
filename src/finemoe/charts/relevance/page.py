"""The report of `finemoe analyze relevance` as one HTML page."""

from __future__ import annotations

from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.knockout.page import Results, subtitle
from finemoe.charts.numbers import clean, count
from finemoe.charts.page import Code, Figure, Section, Table, Text, render_page


def relevance_page(results: Results) -> str:
    """Which experts a task needs: how relevance adds up over the experts of each layer, and which are selected."""
    results = clean(results)
    selection = results["selection"]
    share, total = selection["trainable_share"], selection["trainable_parameters"]
    text = (
        f"Expert relevance after ESFT (arXiv 2407.01906), {selection['score']} score: in every layer the fewest "
        f"experts whose relevance adds up to {selection['p']:g} of the layer's. {count(total)} parameters in them "
        f"would be trained, {100 * share:.2f} % of the model. {results['samples']} samples, "
        f"{count(results['tokens'])} tokens; the paper takes 32 samples of 4,096."
    )
    rows = [
        [
            str(layer["layer"]),
            str(len(layer["experts"])),
            f"{100 * sum(layer['scores']):.1f} %",
            _named(layer["experts"]),
        ]
        for layer in selection["layers"]
    ]
    table = Table("Selected experts", ["Layer", "Experts", "Relevance reached", "Which, best first"], rows, (1, 2))
    caption = (
        "The experts of each layer from the best on, each as wide as its share of the layer's relevance: the wider the "
        "first ones, the fewer the task needs. The number says how many are selected."
    )
    sections = [
        Section("Selection", [Text([text]), table]),
        Section("Concentration", [Figure([relevance_chart(results)], caption)]),
        Section("How it was measured", [Code(str(results.get("command") or ""), "The command")]),
    ]
    return render_page(
        "The experts a task needs",
        sections,
        subtitle=subtitle(results),
        footer=f"Made by finemoe {results.get('finemoe_version') or ''}. This file needs no network.",
    )


def _named(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def relevance_chart(results: Results) -> Any:
    """A bar a layer: relevance of its experts stacked from the best on, the selected ones in full colour."""
    results = clean(results)
    rows, ends = [], []
    for layer in results["selection"]["layers"]:
        reached, chosen = results["cumulative"][str(layer["layer"])], len(layer["experts"])
        for rank, (low, high) in enumerate(zip([0.0, *reached], reached, strict=False)):
            kind = "selected" if rank < chosen else "others"
            rows.append({"layer": layer["layer"], "rank": rank + 1, "low": 100 * low, "high": 100 * high, "kind": kind})
        ends.append({"layer": layer["layer"], "high": 100 * reached[chosen - 1], "text": str(chosen)})
    title = "cumulative relevance, best expert first (%)"
    x = alt.X("low:Q", title=title, scale=alt.Scale(domain=[0, 100]))
    y = alt.Y("layer:O", title="MoE layer")
    kinds = alt.Scale(domain=["others", "selected"])
    color = alt.Color("kind:N", scale=kinds, legend=alt.Legend(orient="top", title=None))
    opacity = alt.Opacity("kind:N", scale=alt.Scale(domain=["others", "selected"], range=[0.3, 1]), legend=None)
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("rank:Q"), alt.Tooltip("high:Q", title="reached, %", format=".2f")]
    bars = theme.base(rows).mark_bar(height={"band": 0.72}, stroke="white", strokeWidth=0.4)
    bars = bars.encode(x, y, alt.X2("high:Q"), color, opacity, tooltip=tooltip)
    number = theme.base(ends).mark_text(align="left", dx=5, fontWeight="bold")
    number = number.encode(alt.X("high:Q", title=title), y, text="text:N")
    return alt.layer(bars, number).properties(
        width=theme.WIDTH - 80,
        height=alt.Step(24),
        description="Selected experts by layer: " + ", ".join(f"layer {e['layer']} {e['text']}" for e in ends) + ".",
    )
