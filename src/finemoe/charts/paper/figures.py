"""The figures of `finemoe paper`: every difference beside the printed one, Figures 4 and 5, and the losses of all arms.

Each function takes the `results` of `finemoe paper` and returns an altair chart, or None with nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.comparison.figures import final_losses
from finemoe.charts.numbers import Results, clean, finite, fixed
from finemoe.charts.paper.words import every_claim

PRINTED_MASKED = {
    "DeepSeekMoE": {0: 1.808, 1 / 16: 7.468, 2 / 16: 8.196, 3 / 16: 8.706, 4 / 16: 9.071},
    "GShard x1.5": {0: 1.808, 1 / 16: 5.586, 2 / 16: 7.518, 3 / 16: 7.627, 4 / 16: 7.721},
}
"""Figure 4, Pile loss, read off the figure's own paths."""
PRINTED_ACTIVE = {"DeepSeekMoE": {3 / 7: 1.956, 4 / 7: 1.868, 5 / 7: 1.831, 6 / 7: 1.814, 1: 1.808}}
"""Figure 5, likewise, by share of the 7 routed experts; GShard in full is 1.867."""
VERDICTS = ("reproduced", "undecided", "contradicted")
_SHAPES = ("circle", "triangle-up", "cross")
_TICKS = alt.Axis(tickCount=5, grid=True, labelOverlap="parity", labelSeparation=6, labelFlush=False)


def figures(results: Results) -> dict[str, Any]:
    """Every figure that `results` can fill, by file name."""
    made = {"differences": differences(results), "losses": final_losses(results)}
    masked, active = masked_panels(results), active_panels(results)
    made |= {
        name: alt.hconcat(*panels, spacing=36) for name, panels in (("masked", masked), ("active", active)) if panels
    }
    return {name: chart for name, chart in made.items() if chart is not None}


def differences(results: Results) -> Any:
    """A row for each claim about losses: our difference with its interval, and the printed one where there is one.

    Rises of several nats (Figure 4) would flatten the rest; they have a figure of their own and are left out.
    """
    rows = []
    for claim in every_claim(clean(results)):
        found = claim.get("difference") or {}
        if finite(found.get("mean")) is None or claim["unit"] == "MaxVio" or claim["id"].startswith("masked"):
            continue
        rows.append({
            "claim": f"{claim['a']['label']} − {claim['b']['label']}", "statement": claim["statement"], **found,
            "printed": claim.get("printed_difference"), "verdict": claim["verdict"], "paper": "the paper",
        })  # fmt: skip
    rows = list({row["claim"]: row for row in reversed(rows)}.values())[::-1]  # two papers may say the same of one pair
    if not rows:
        return None
    title = "difference in loss (nats per token); below 0 the first is better"
    reach = [row[key] for row in rows for key in ("mean", "low", "high", "printed") if row[key] is not None]
    pad = 0.05 * (max(reach) - min(reach)) or 0.05
    scale = alt.Scale(domain=[min(0, *reach) - pad, max(0, *reach) + pad], nice=False)
    x = alt.X("mean:Q", title=title, scale=scale, axis=_TICKS)
    y = alt.Y("claim:N", title=None, axis=None, scale=alt.Scale(type="band", domain=[row["claim"] for row in rows]))
    marks = theme.base(rows)
    zero = marks.mark_tick(thickness=1.5, size=22, yOffset=8, opacity=0.6).encode(x=alt.datum(0), y=y)
    bar = marks.mark_rule(strokeWidth=2.4, yOffset=8).encode(
        alt.X("low:Q", scale=scale, title=title), y, alt.X2("high:Q")
    )
    tooltip = [
        alt.Tooltip("statement:N"),
        *(alt.Tooltip(f"{key}:Q", format="+.4f") for key in ("mean", "low", "high", "printed")),
        alt.Tooltip("verdict:N"),
    ]
    legend = alt.Legend(title="ours, 95 % interval over seeds", orient="top", symbolOpacity=1)
    color = alt.Color("verdict:N", scale=alt.Scale(domain=list(VERDICTS)), legend=legend)
    shape = alt.Shape("verdict:N", scale=alt.Scale(domain=list(VERDICTS), range=list(_SHAPES)), legend=legend)
    dot = marks.mark_point(size=90, filled=True, opacity=1, yOffset=8).encode(x, y, color, shape, tooltip=tooltip)
    printed = alt.X("printed:Q", scale=scale, title=title)
    paper = marks.transform_filter("datum.printed !== null").mark_tick(thickness=3, size=16, yOffset=8)
    stroke = alt.Legend(title=None, orient="top", symbolType="M0,-1V1", symbolStrokeWidth=3, symbolSize=160)
    named = alt.Opacity("paper:O", scale=alt.Scale(domain=["the paper"], range=[0.9]), legend=stroke)
    text = marks.mark_text(align="left", dy=-9).encode(y, x=alt.value(2), text="claim:N")
    said = "; ".join(f"{row['claim']} {fixed(row['mean'])}, {row['verdict']}" for row in rows)
    return alt.layer(
        zero, bar.transform_filter("datum.low !== null"), paper.encode(printed, y, named), dot, text
    ).properties(width=theme.WIDTH - 20, height=alt.Step(40), description=f"{title}. {said}.")


def masked_panels(results: Results) -> list[Any]:
    """Figure 4, the paper's and ours: loss against the share of routed experts masked."""
    ours = [point for point in clean(results)["curves"]["masked"] if point["arm"] in PRINTED_MASKED]
    return _panels(ours, PRINTED_MASKED, "share of routed experts masked, best first", ".1%")


def active_panels(results: Results) -> list[Any]:
    """Figure 5, the paper's and ours: loss against the share of the routed experts that stay active."""
    ours = [point for point in clean(results)["curves"]["active"] if point["arm"] == "DeepSeekMoE"]
    return _panels(ours, PRINTED_ACTIVE, "active routed experts ÷ those trained with", ".0%")


def _panels(
    ours: Sequence[Mapping[str, Any]], printed: Mapping[str, Mapping[float, float]], across: str, percent: str
) -> list[Any]:
    if not ours:
        return []
    names = list(printed)
    theirs: list[Mapping[str, Any]] = [
        {"arm": arm, "setting": x, "mean": y, "low": y, "high": y} for arm, by in printed.items() for x, y in by.items()
    ]
    panels = []
    for title, rows in (("The paper: Pile loss", theirs), ("Ours: held-out loss", ours)):
        marks = theme.base(rows)
        axis = alt.Axis(format=percent, tickCount=5, labelOverlap="parity")
        x = alt.X("setting:Q", title=across, scale=alt.Scale(zero=False, nice=False, padding=12), axis=axis)
        scale = alt.Scale(zero=False)
        y = alt.Y("mean:Q", title="loss (nats per token)", scale=scale)
        color, dash = theme.arm_color(names), theme.arm_dash(names)
        tooltip = [alt.Tooltip("arm:N"), alt.Tooltip("setting:Q", format=percent)]
        tooltip += [alt.Tooltip(f"{key}:Q", format=".4f") for key in ("mean", "low", "high")]
        bar = marks.transform_filter("datum.low !== null").mark_rule(strokeWidth=1.6)
        layers = [
            bar.encode(x, alt.Y("low:Q", scale=scale, title="loss (nats per token)"), alt.Y2("high:Q"), color),
            marks.mark_line(strokeWidth=2.2).encode(x, y, color, dash),
            marks.mark_point(size=70, filled=True, opacity=1).encode(
                x, y, color, theme.arm_shape(names), tooltip=tooltip
            ),
        ]
        if len(names) > 1:
            last = {row["arm"]: row for row in sorted(rows, key=lambda row: float(row["setting"]))}
            ends = sorted(last.values(), key=lambda row: -float(row["mean"]))
            for end, offset in zip(
                ends, (-14, 20), strict=False
            ):  # the upper one's name above it, the lower one's below
                name = theme.base([end]).mark_text(align="right", dy=offset)
                layers.append(name.encode(x, y, color, text="arm:N"))
        said = "; ".join(f"{row['arm']} {row['setting']:.3g}: {fixed(row['mean'])}" for row in rows)
        panels.append(
            alt.layer(*layers).properties(
                title=title, width=280, height=240, description=f"{title} against {across}: {said}."
            )
        )
    return panels
