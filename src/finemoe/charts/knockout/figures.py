"""The figures of knock-outs: the paper's Figures 4 and 5 beside ours, every expert, pairs of experts, whole layers.

Each takes the `results` of `finemoe analyze knockout`. Losses are in nats per token; a difference is against the intact
model, so that above 0 means worse. Bars and bands are 95 % intervals over windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import Results, clean, finite, fixed

Row = dict[str, Any]
RISE = "rise in loss (nats per token)"
_HEIGHT = 230
_MOST_MAPS = 6
PART_NAMES = {"routed": "routed out", "shared": "shared out", "both": "both out"}
ARM_NAMES = {True: "replaced by routed ones", False: "taken out"}


def figures(results: Results) -> dict[str, Any]:
    """Every figure that `results` can fill, by file name."""
    made: dict[str, Any] = {}
    for name in ("masked", "active"):
        if panels := curves(results, name):
            made[name] = alt.hconcat(*(panel.properties(width=300) for panel in panels), spacing=30)
        if domains := domain_curves(results, name):
            made[f"{name}_domains"] = alt.concat(*(c.properties(width=200) for c in domains), columns=3)
    made |= {"shared": shared_dots(results), "experts": expert_map(results), "usage": usage_dots(results)}
    if pairs := pair_maps(results):
        made["pairs"] = alt.vconcat(*pairs)
    made["layers"] = layer_dots(results)
    return {name: chart for name, chart in made.items() if chart is not None}


def records(results: Results, experiment: str) -> list[Row]:
    """The records of an experiment; none where it was not run."""
    made = clean(results)["experiments"].get(experiment)
    return list(made["records"]) if made else []


# ---- the paper's curves ----


def curves(results: Results, experiment: str) -> list[Any]:
    """`masked` or `active`: our rise over the intact model with its interval, and the paper's in a panel of its own."""
    rows = _steps(records(results, experiment), experiment)
    if not rows:
        return []
    axis = _STEPS[experiment]
    ours = _curve(rows, axis, "This model", zero=True)
    return [ours, _curve(_paper_rows(results, experiment), axis, "The paper (2B, Pile)", zero=True)]


def domain_curves(results: Results, experiment: str) -> list[Any]:
    """Small multiples: the same rise in each domain, all on one scale."""
    found = records(results, experiment)
    names = list(found[0]["by_domain"]) if found else []
    if len(names) < 2:
        return []
    rows = {name: _steps([r | r["by_domain"][name] for r in found], experiment) for name in names}
    values = [row[key] for each in rows.values() for row in each for key in ("rise", "low", "high") if key in row]
    real = [value for value in values if value is not None]
    window = (min(0.0, *real), max(0.0, *real))
    return [_curve(each, _STEPS[experiment], name, window=window) for name, each in rows.items()]


_STEPS = {
    "masked": "best experts left out (sixteenths of all)",
    "active": "routed experts active per token",
}


def _steps(found: Sequence[Mapping[str, Any]], experiment: str) -> list[Row]:
    """Points of one curve: x in sixteenths or experts, and the rise over the intact model."""
    rows: list[Row] = [{"x": 0, "rise": 0.0, "low": None, "high": None}] if experiment == "masked" and found else []
    for one in found:
        x = 16 * one["fraction"] if experiment == "masked" else one["count"]
        change = one["difference"]
        if x or experiment == "active":
            rows.append({"x": x, "rise": change["mean"], "low": change["low"], "high": change["high"]})
    return [row | {"series": "this model"} for row in rows]


def _paper_rows(results: Results, experiment: str) -> list[Row]:
    paper = results["paper"]
    if experiment == "masked":
        series = paper["masked"]
        whole = {name: points["0"] for name, points in series.items()}
    else:
        series = {"DeepSeekMoE": paper["active"]}
        whole = {"DeepSeekMoE": paper["active"]["7"]}
    return [
        {"x": float(x), "rise": loss - whole[name], "low": None, "high": None, "series": name}
        for name, points in series.items()
        for x, loss in points.items()
    ]


def _curve(
    rows: Sequence[Row], title: str, heading: str, *, zero: bool = True, window: tuple[float, float] | None = None
) -> Any:
    names = list(dict.fromkeys(row["series"] for row in rows))
    wide: dict[str, Any] = {} if window is None else {"domain": list(window)}
    xs = sorted({row["x"] for row in rows})
    pad = 0.04 * (xs[-1] - xs[0]) or 0.5  # the outermost bars stand clear of the axis
    place = alt.Scale(domain=[xs[0] - pad, xs[-1] + pad], nice=False, zero=False)
    x = alt.X("x:Q", title=title, axis=alt.Axis(values=xs, format="~g", grid=False), scale=place)
    y = alt.Y("rise:Q", title=RISE, scale=alt.Scale(zero=zero, **wide), axis=alt.Axis(tickCount=5))
    legend = alt.Legend(orient="top", title=None) if len(names) > 1 else None
    color = alt.Color("series:N", scale=alt.Scale(domain=names), legend=legend)
    dash = alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=theme.arm_dashes(len(names))), legend=legend)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=names, range=theme.arm_shapes(len(names))), legend=legend)
    marks = theme.base(rows)
    tooltip = [alt.Tooltip("series:N", title="of"), alt.Tooltip("x:Q", title=title)]
    tooltip += [alt.Tooltip(f"{key}:Q", format="+.4f") for key in ("rise", "low", "high")]
    bar = marks.transform_filter("datum.low !== null").mark_rule(strokeWidth=2).encode(
        x, alt.Y("low:Q", title=RISE), alt.Y2("high:Q"), color
    )  # fmt: skip
    line = marks.mark_line(strokeWidth=2.2).encode(x, y, color, dash)
    dot = marks.mark_point(size=60, filled=True, opacity=1).encode(x, y, color, shape, tooltip=tooltip)
    said = "; ".join(f"{row['series']} at {row['x']:g}: {fixed(row['rise'])}" for row in rows)
    return alt.layer(line, bar, dot).properties(
        title=heading, width=320, height=_HEIGHT, description=f"{heading}: {RISE} against {title}. {said}."
    )


# ---- shared experts and layers: markers with intervals ----


def shared_dots(results: Results) -> Any | None:
    """Without the shared experts, replaced or not: overall and by domain."""
    rows = []
    for one in records(results, "shared"):
        places = {"all domains": one, **(one["by_domain"] if len(one["by_domain"]) > 1 else {})}
        for place, each in places.items():
            rows.append({"row": place, "series": ARM_NAMES[one["replaced"]], **_change(each)})
    return _dots(rows, "") if rows else None


def layer_dots(results: Results, domain: str | None = None) -> Any | None:
    """The routed part, the shared part or both of each layer left out, in one domain or overall."""
    rows = [
        {
            "row": str(one["layer"]),
            "series": PART_NAMES[one["part"]],
            **_change(one if domain is None else one["by_domain"][domain]),
        }
        for one in records(results, "layers")
    ]
    return _dots(rows, "layer", domain or "") if rows else None


def layer_dots_by_domain(results: Results) -> list[Any]:
    """The same for each of the first few domains."""
    found = records(results, "layers")
    names = list(found[0]["by_domain"]) if found else []
    return [layer_dots(results, name) for name in names[:_MOST_MAPS]] if len(names) > 1 else []


def _change(one: Mapping[str, Any]) -> Row:
    change = one["difference"]
    return {"rise": change["mean"], "low": change["low"], "high": change["high"]}


def _dots(rows: Sequence[Row], title: str, heading: str = "") -> Any:
    names = list(dict.fromkeys(row["series"] for row in rows))
    order = list(dict.fromkeys(row["row"] for row in rows))
    legend = alt.Legend(orient="top", title=None, columns=3)
    color = alt.Color("series:N", scale=alt.Scale(domain=names), legend=legend)
    shape = alt.Shape("series:N", scale=alt.Scale(domain=names, range=theme.arm_shapes(len(names))), legend=legend)
    few = alt.Axis(tickCount=6, labelOverlap="parity", labelSeparation=6, labelFlush=False)
    x = alt.X("rise:Q", title=RISE, scale=alt.Scale(zero=True), axis=few)
    y = alt.Y("row:N", title=title or None, sort=order, axis=alt.Axis(grid=True, ticks=False, labelLimit=140))
    offset = alt.YOffset("series:N", scale=alt.Scale(domain=names))
    marks = theme.base(rows)
    tooltip = [alt.Tooltip("row:N", title=title or "text"), alt.Tooltip("series:N", title="what")]
    tooltip += [alt.Tooltip(f"{key}:Q", format="+.4f") for key in ("rise", "low", "high")]
    bar = marks.transform_filter("datum.low !== null").mark_rule(strokeWidth=2.2).encode(
        alt.X("low:Q", title=RISE), y, alt.X2("high:Q"), yOffset=offset, color=color
    )  # fmt: skip
    dot = marks.mark_point(size=70, filled=True, opacity=1).encode(
        x, y, yOffset=offset, color=color, shape=shape, tooltip=tooltip
    )
    zero = theme.base([{"rise": 0}]).mark_rule(strokeDash=[4, 3]).encode(x)
    said = "; ".join(f"{row['row']}, {row['series']}: {fixed(row['rise'])}" for row in rows)
    return alt.layer(zero, bar, dot).properties(
        title=heading, width=theme.WIDTH - 120, height=alt.Step(15), description=f"{RISE}. {said}."
    )


# ---- single experts and pairs: maps ----


def expert_map(results: Results, domain: str | None = None) -> Any | None:
    """Layer by expert: the change in loss with that one expert left out, in one domain or overall."""
    found = records(results, "experts")
    if not found:
        return None
    whole = found if domain is None else [each for one in found for each in one["by_domain"].values()]
    top, clamped = _reach([one["difference"]["mean"] for one in whole])
    rows = []
    for one in found:
        each = one if domain is None else one["by_domain"][domain]
        rows.append({"layer": one["layer"], "expert": one["expert"], "share": one["share"], **_change(each)})
        rows[-1]["certain"] = theme.certain(rows[-1]["low"], rows[-1]["high"])
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), alt.Tooltip("share:Q", title="load", format=".2%")]
    tooltip += [alt.Tooltip(f"{key}:Q", format="+.5f") for key in ("rise", "low", "high")]
    experts = sorted({row["expert"] for row in rows})
    layers = len({row["layer"] for row in rows})
    labels = [experts[number] for number in theme.expert_ticks(len(experts))]
    worst = max(rows, key=lambda row: finite(row["rise"]) or 0.0)
    return (
        theme.base(rows)
        .mark_rect()
        .encode(
            alt.X("expert:O", title="routed expert", axis=alt.Axis(labelAngle=0, values=labels, labelOverlap=True)),
            alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True)),
            _heat("rise:Q", top, "rise, nats per token" + (" (ends: or beyond)" if clamped else "")),
            theme.fade(),
            tooltip=tooltip,
        )
        .properties(
            title=domain or "All domains",
            width=theme.WIDTH - 60,
            height=alt.Step(24 if layers <= 12 else 12),
            description=f"Change in loss with one expert left out, {len(rows)} experts of {layers} layers; most with "
            f"expert {worst['expert']} of layer {worst['layer']}: {fixed(worst['rise'], 4)} nats per token.",
        )
    )


def expert_maps_by_domain(results: Results) -> list[Any]:
    """The same map for each of the first few domains, on the colour scale of all of them."""
    found = records(results, "experts")
    names = list(found[0]["by_domain"]) if found else []
    return [expert_map(results, name) for name in names[:_MOST_MAPS]] if len(names) > 1 else []


def usage_dots(results: Results) -> Any | None:
    """How much an expert is used against what leaving it out costs."""
    rows = [
        {"layer": str(one["layer"]), "expert": one["expert"], "share": 100 * one["share"], **_change(one)}
        for one in records(results, "experts")
    ]
    if not rows:
        return None
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    few = len(layers) <= len(theme.SHAPES)
    legend = alt.Legend(orient="top", title="layer", columns=8)
    domain = alt.Scale(domain=layers)
    shapes = alt.Scale(domain=layers, range=theme.arm_shapes(len(layers)))
    extra = (
        {"color": alt.Color("layer:N", scale=domain, legend=legend), "shape": alt.Shape("layer:N", scale=shapes)}
        if few
        else {}
    )
    tooltip = [alt.Tooltip("layer:N"), alt.Tooltip("expert:O"), alt.Tooltip("share:Q", format=".2f", title="% of load")]
    tooltip += [alt.Tooltip(f"{key}:Q", format="+.5f") for key in ("rise", "low", "high")]
    return (
        theme.base(rows)
        .mark_point(size=45, filled=True, opacity=0.75)
        .encode(
            alt.X("share:Q", title="share of its layer's assignments (%)", scale=alt.Scale(zero=True)),
            alt.Y("rise:Q", title=RISE, scale=alt.Scale(zero=True)),
            tooltip=tooltip,
            **extra,
        )
        .properties(
            width=theme.WIDTH - 60, height=280, description=f"{RISE} of each expert against how much it is used."
        )
    )


def pair_maps(results: Results) -> list[Any]:
    """For each layer the matrix of interactions: what two experts cost together beyond what each costs alone."""
    found = records(results, "pairs")
    charts = []
    top, clamped = _reach([one["interaction"]["mean"] for one in found]) if found else (1.0, False)
    for layer in dict.fromkeys(one["layer"] for one in found):
        rows = []
        for one in found:
            if one["layer"] == layer:
                effect = one["interaction"]
                told = {"value": effect["mean"], "low": effect["low"], "high": effect["high"]}
                told["certain"] = theme.certain(effect["low"], effect["high"])
                i, j = one["experts"]
                rows += [{"a": i, "b": j, **told}, {"a": j, "b": i, **told}]
        marks = theme.base(rows)
        x = alt.X("a:O", title="expert", axis=alt.Axis(labelAngle=0))
        y = alt.Y("b:O", title="expert")
        tooltip = [alt.Tooltip("a:O", title="expert"), alt.Tooltip("b:O", title="and")]
        tooltip += [alt.Tooltip(f"{key}:Q", format="+.5f") for key in ("value", "low", "high")]
        title = "interaction, nats per token" + (" (ends: or beyond)" if clamped else "")
        cells = marks.mark_rect().encode(x, y, _heat("value:Q", top, title), theme.fade(), tooltip=tooltip)
        said = f"Layer {layer}: interaction of pairs of experts, positive where they cover for each other."
        charts.append(cells.properties(title=f"Layer {layer}", width=420, height=alt.Step(30), description=said))
    return charts


def _reach(values: Sequence[float]) -> tuple[float, bool]:
    """Where the colours end: the 98th percentile of the sizes, lest one flatten the rest; whether some lie beyond."""
    sizes = sorted(abs(value) for value in values if finite(value) is not None) or [1.0]
    top = sizes[min(len(sizes) - 1, int(0.98 * len(sizes)))] or sizes[-1] or 1.0
    return top, sizes[-1] > top


def _heat(field: str, top: float, title: str) -> alt.Color:
    scale = alt.Scale(domain=[-top, top], domainMid=0, clamp=True, interpolate="lab")
    legend = alt.Legend(title=title, orient="top", gradientLength=220, values=[-top, 0, top], format="+.2~g")
    return alt.Color(field, scale=scale, legend=legend)
