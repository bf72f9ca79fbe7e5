"""The figure of `finemoe analyze relevance`."""

from __future__ import annotations

from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results, clean


def figures(results: Results) -> dict[str, Any]:
    """Every figure, by file name."""
    return {"relevance": relevance_chart(results)}


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
    y = alt.Y("layer:O", title="layer")
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
