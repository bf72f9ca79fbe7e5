"""The figures of `finemoe evaluate`: scores with their intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.evaluation.words import difference_text, is_share, metric_name, value_text
from finemoe.charts.numbers import Results, clean, finite

_ROW = 30


def figures(results: Results) -> dict[str, Any]:
    """Every figure that `results` can fill, by file name."""
    results = clean(results)
    found = {"scores" if share else f"scores-{metric}": chart for metric, share, chart in score_charts(results)}
    difference = difference_chart(results)
    return found | ({} if difference is None else {"differences": difference})


def score_charts(results: Results) -> list[tuple[str, bool, Any]]:
    """Metric, whether it is a share, and the chart: all shares in one, every other metric in one of its own."""
    rows = _score_rows(results)
    kinds = list(
        dict.fromkeys((("" if is_share(row["metric"]) else row["metric"]), is_share(row["metric"])) for row in rows)
    )
    return [
        (
            metric,
            share,
            _chart(
                results,
                [row for row in rows if share == is_share(row["metric"]) and (share or row["metric"] == metric)],
            ),
        )
        for metric, share in kinds
    ]


def _score_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for task, about in results["tasks"].items():
        for model, scores in results["scores"].items():
            own = scores.get(task, {}).get("metrics", {}).get(about["metric"])
            if own is None:
                continue
            scale = 100 if is_share(about["metric"]) else 1
            numbers = {
                key: None if (v := finite(own.get(key))) is None else scale * v for key in ("value", "low", "high")
            }
            chance = None if finite(about["chance"]) is None else scale * about["chance"]
            shown = value_text(own["value"], about["metric"])
            label = about["title"] if len(results["models"]) == 1 else f"{about['title']} · {model}"
            rows.append(
                {"arm": model, "row": label, "metric": about["metric"], "chance": chance, "text": shown, **numbers}
            )
    return rows


def _chart(results: Results, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Scores with their 95 % intervals, a row a task and model; a tick where guessing stands."""
    names, metric = list(results["models"]), rows[0]["metric"]
    title = "score (%)" if is_share(metric) else metric_name(metric)
    reached = [row[key] for row in rows for key in ("value", "low", "high", "chance") if row[key] is not None]
    least, most = min(reached), max(reached)
    pad = 0.08 * (most - least) or 0.05 * abs(most) or 1.0
    # Beyond 0 and 100 %, so that a marker there keeps clear of the names and of the edge.
    domain = [least - pad, most + pad]
    scale = alt.Scale(domain=domain, nice=False)
    x = alt.X("value:Q", title=title, scale=scale, axis=theme.FEW_TICKS)
    band = alt.Scale(type="band", domain=[row["row"] for row in rows], paddingInner=0, paddingOuter=0.2)
    y = alt.Y("row:N", title=None, scale=band, axis=alt.Axis(grid=True, ticks=False, domain=False, labelLimit=220))
    marks = theme.base(rows)
    color = theme.arm_color(names)
    bar = marks.transform_filter("datum.low !== null").mark_rule(strokeWidth=2.4)
    bar = bar.encode(alt.X("low:Q", scale=scale, title=title), y, alt.X2("high:Q"), color)
    guess = marks.transform_filter("datum.chance !== null").mark_tick(thickness=2, size=22, opacity=0.75)
    guess = guess.encode(alt.X("chance:Q", scale=scale, title=title), y)
    tooltip = [
        alt.Tooltip("row:N", title="of"),
        *(alt.Tooltip(f"{k}:Q", format=".3f") for k in ("value", "low", "high")),
    ]
    dot = marks.mark_point(size=80, filled=True, opacity=1).encode(x, y, color, theme.arm_shape(names), tooltip=tooltip)
    text = marks.mark_text(dy=-12, fontSize=11).encode(x, y, text="text:N")
    said = "; ".join(f"{row['row']} {row['text']}" for row in rows)
    return alt.layer(guess, bar, dot, text).properties(
        width=theme.WIDTH - 200, height=alt.Step(_ROW), description=f"Scores with 95 % intervals: {said}."
    )


def difference_chart(results: Results) -> Any:
    """Paired differences in points, with their 95 % intervals; None without a pair."""
    rows = []
    for pair in results["differences"]:
        if not is_share(pair["metric"]):
            continue
        label = f"{results['tasks'][pair['task']]['title']}: {pair['a']} − {pair['b']}"
        numbers = {key: None if finite(pair[key]) is None else 100 * pair[key] for key in ("value", "low", "high")}
        decided = "decided" if pair["verdict"] != "undecided" else "undecided"
        text = f"{label}: {difference_text(pair, pair['metric'])}, {decided}"
        rows.append({"row": label, "decided": decided, "text": text, **numbers})
    if not rows:
        return None
    title = "difference in score (percentage points)"
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=True), axis=theme.FEW_TICKS)
    y = alt.Y("row:N", title=None, axis=None, scale=alt.Scale(domain=[row["row"] for row in rows]))
    marks = theme.base(rows)
    zero = marks.mark_tick(thickness=1.5, size=20, yOffset=8, opacity=0.6).encode(x=alt.datum(0), y=y)
    bar = marks.transform_filter("datum.low !== null").mark_rule(strokeWidth=2.4, yOffset=8)
    bar = bar.encode(alt.X("low:Q", title=title), y, alt.X2("high:Q"))
    dots = theme.decided_dots(marks, x, y)
    text = marks.mark_text(align="left", dy=-9).encode(y, x=alt.value(2), text="text:N")
    return alt.layer(zero, bar, *dots, text).properties(
        width=theme.WIDTH - 20, height=alt.Step(40), description="; ".join(str(row["text"]) for row in rows) + "."
    )
