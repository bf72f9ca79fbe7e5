"""The figures of `finemoe plan`: memory of each rank, what a step is spent on, and its time line."""

from __future__ import annotations

from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results
from finemoe.charts.plan.words import GIB

_MEMORY = (
    ("weights", "weights"), ("gradients", "gradients"), ("moments", "moments"), ("gathered", "gathered weights"),
    ("whole_gradients", "whole gradients"), ("activations", "activations"), ("buffers", "rows on their way, loss"),
    ("beside", "beside"),
)  # fmt: skip
_STEP = (
    ("products", "products"), ("experts", "experts"), ("scores", "attention"), ("memory", "passes over memory"),
    ("host", "host"), ("exchange", "exchange not hidden"), ("bubble", "bubble"), ("update", "update"),
)  # fmt: skip
_KINDS = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights", "FB": "both at once"}


def figures(results: Results) -> dict[str, Any]:
    """Every figure by file name, for paper."""
    made = {"memory": memory_bars(results), "step": step_bar(results)}
    if (line := time_line(results)) is not None:
        made["timeline"] = line
    return {name: chart.properties(width=theme.WIDTH) for name, chart in made.items()}


def memory_bars(results: Results) -> Any:
    """A bar for each rank of the pipeline, in parts; below them the fullest at MaxVio 1; a line at what there is."""
    memory = results["memory"]
    names = [f"rank {rank}" if len(memory["even"]) > 1 else "MaxVio 0" for rank in range(len(memory["even"]))]
    bars = [*zip(names, memory["even"], strict=True), ("MaxVio 1", memory["uneven"])]
    bars = [(name, {**bar, "buffers": bar["exchange"] + bar["loss"]}) for name, bar in bars]
    rows = [
        {"rank": name, "part": words, "order": order, "gib": bar[key] / GIB}
        for name, bar in bars
        for order, (key, words) in enumerate(_MEMORY)
        if bar[key]
    ]
    parts = [words for key, words in _MEMORY if any(bar[key] for _, bar in bars)]
    y = alt.Y("rank:N", title=None, sort=[name for name, _ in bars])
    color = alt.Color("part:N", scale=alt.Scale(domain=parts), sort=parts, legend=_legend())
    tooltip = ["rank:N", "part:N", alt.Tooltip("gib:Q", title="GiB", format=".2f")]
    stacked = (
        theme.base(rows)
        .mark_bar(stroke="gray", strokeWidth=0.3)
        .encode(alt.X("gib:Q", title="GiB"), y, color, order=alt.Order("order:Q"), tooltip=tooltip)
    )
    limit = (
        theme.base([{"gib": memory["available"] / GIB}]).mark_rule(strokeDash=[5, 3], strokeWidth=2).encode(x="gib:Q")
    )
    said = f"{memory['peak']['total'] / GIB:.1f} GiB at most, {memory['available'] / GIB:.1f} there are (dashed)"
    return alt.layer(stacked, limit).properties(
        height=max(80, 22 * len(bars)), description=f"Memory of a rank: {said}."
    )


def step_bar(results: Results) -> Any:
    """What the seconds of a step are spent on."""
    parts = results["step"]["parts"]
    rows = [
        {"part": words, "order": order, "seconds": parts[key], "share": parts[key] / parts["total"]}
        for order, (key, words) in enumerate(_STEP)
        if parts[key]
    ]
    names = [row["part"] for row in rows]
    tooltip = ["part:N", alt.Tooltip("seconds:Q", format=".3g"), alt.Tooltip("share:Q", format=".1%")]
    return (
        theme.base(rows)
        .mark_bar()
        .encode(
            alt.X("seconds:Q", title="seconds of a step"),
            alt.Y("part:N", title=None, sort=names),
            tooltip=tooltip,
        )
        .properties(height=22 * len(rows), description=f"A step of {parts['total']:.3g} s, by what it is spent on.")
    )


def time_line(results: Results) -> Any | None:
    """When each rank of the pipeline does what; None without a pipeline."""
    spans = results["timeline"]["spans"]
    if not spans:
        return None
    rows = [{**span, "kind": _KINDS[span["kind"]], "rank": f"rank {span['rank']}"} for span in spans]
    kinds = [words for words in _KINDS.values() if any(row["kind"] == words for row in rows)]
    ranks = list(dict.fromkeys(row["rank"] for row in sorted(rows, key=lambda row: int(row["rank"][5:]))))
    color = alt.Color("kind:N", scale=alt.Scale(domain=kinds), sort=kinds, legend=_legend())
    tooltip = [
        "rank:N",
        "kind:N",
        "micro_batch:Q",
        alt.Tooltip("start:Q", format=".3f"),
        alt.Tooltip("end:Q", format=".3f"),
    ]
    return (
        theme.base(rows)
        .mark_bar(stroke="gray", strokeWidth=0.3)
        .encode(
            alt.X("start:Q", title="seconds"), alt.X2("end:Q"), alt.Y("rank:N", title=None, sort=ranks), color,
            tooltip=tooltip,
        )
        .properties(
            height=max(60, 18 * len(ranks)),
            description=f"One step of {results['timeline']['micro_batches']} micro-batches on {len(ranks)} ranks.",
        )
    )  # fmt: skip


def _legend() -> alt.Legend:
    return alt.Legend(title=None, orient="top", columns=5, symbolType="square")
