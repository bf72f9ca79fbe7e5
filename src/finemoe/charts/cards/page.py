"""The page of `finemoe analyze experts`: an overview of all experts, a search, a card for each; and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from finemoe.charts import theme
from finemoe.charts.numbers import NOTHING, clean, count, finite, fixed
from finemoe.charts.page import Bullets, Code, Figure, Section, Table, Text, Widget, render_page

Results = Mapping[str, Any]
MOST_CELLS = 6000  # of heat maps on the page; more of them are slow to draw, and figures/ has them all
HOTTEST = 4.0

_READING = (
    "Experts and layers are numbered from 0, as in the model; layers without experts are left out.",
    "Load is the expert's share of the layer's assignments, divided by the uniform share.",
    "Specialisation is 1 − H(q) ÷ log D over the D domains, q being the share of each domain's tokens that the expert "
    "takes, made to sum to one: 0 is an expert that takes of every domain alike, 1 one that takes of a single domain. "
    "An expert that took few tokens can have a high figure by chance: see its load.",
    "A token's lift is P(token | expert), by gate weight, divided by P(token) in the text; contexts are the places of "
    "the text where the expert's gate weight is highest. ␣ is a blank, ↵ the end of a line.",
    "Overlap is |A ∩ B| ÷ |A ∪ B| of the tokens that the expert with this number took of the same text at an earlier "
    "checkpoint and takes now.",
    "Nearest by router: cosine of the router's centroids less their mean. By weights: cosine of the experts' flattened "
    "weights less their mean; hidden units stand in any order, so only experts of common origin are far from 0. Taken "
    "together: how often two experts share a token, over how often they would if each token drew its experts without "
    "regard to each other; 1 is chance.",
)


def cards_page(results: Results) -> str:
    """The whole page as one self-contained HTML document."""
    results = clean(results)
    domains = results["domains"]
    subtitle = " · ".join(
        (f"{len(results['cards']):,} routed experts in {len(results['layers'])} layers",
         f"{count(results['tokens'])} tokens of {len(domains)} domain{'s' if len(domains) != 1 else ''}",
         str(results.get("date") or "")[:10])
    ).rstrip(" ·")  # fmt: skip
    sections = [
        Section("Experts", [Widget("experts", widget_data(results), "Expert cards, with a search")]),
        _layers(results),
        *_maps(results),
        Section("How to read this", [Bullets([*_READING, f"Tokens shown: {results['token_rule']}."])]),
        _made(results),
    ]
    footer = f"Made by finemoe {results.get('finemoe_version') or ''}".rstrip() + ". This file needs no network."
    return render_page(f"Expert cards: {results['model']['source']}", sections, subtitle=subtitle, footer=footer)


def widget_data(results: Results) -> dict[str, Any]:
    """What the page's script needs, with numbers cut to what it shows."""
    names = [domain["domain"] for domain in results["domains"]]
    cards = []
    for card in results["cards"]:
        parts = [{key: _short(each[key]) for key in ("share", "rate", "lift")} for each in card["domains"]]
        contexts = [
            {**context, "domain": names.index(context["domain"]), "gate": _short(context["gate"])}
            for context in card["contexts"]
        ]
        tokens = [
            {**{key: token[key] for key in ("text", "count")}, "share": _short(token["share"]),
             "lift": _short(token["lift"])}
            for token in card["tokens"]
        ]  # fmt: skip
        near = {
            kind: [{"expert": each["expert"], "value": _short(each["value"])} for each in found]
            for kind, found in card["nearest"].items()
        }
        cards.append({
            "id": f"L{card['layer']}E{card['expert']}", "layer": card["layer"], "expert": card["expert"],
            "assignments": card["assignments"], "load": _short(card["relative_load"]),
            "gate": _short(card["mean_gate"]), "specialization": _short(card["specialization"]),
            "leading": leading(card), "domains": parts, "tokens": tokens, "contexts": contexts, "near": near,
            "stability": [{"step": each["step"], "overlap": _short(each["overlap"])} for each in card["stability"]],
        })  # fmt: skip
    layers = [{"layer": layer["layer"]} for layer in results["layers"]]
    return {"domains": names, "layers": layers, "cards": cards, "one_domain": len(names) < 2}


def leading(card: Mapping[str, Any]) -> int | None:
    """Number of the domain that the expert takes the largest part of; None for one that took nothing."""
    rates = [each["rate"] for each in card["domains"]]
    return rates.index(max(rates)) if card["assignments"] else None


def _short(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else float(f"{number:.3g}")


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
    top = min(HOTTEST, max([2.0, *(row["lift"] for found in rows.values() for row in found)]))
    return {layer: _map(layer, found, top) for layer, found in rows.items()}


def _map(layer: int, rows: Sequence[Mapping[str, Any]], top: float) -> Any:
    experts = max((row["expert"] for row in rows), default=0) + 1
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64) if experts <= 17 * step or step == 64)
    axis = alt.Axis(labelAngle=0, values=list(range(0, experts, every)), labelOverlap="parity", labelSeparation=5)
    title = "lift"
    if max((row["lift"] for row in rows), default=0.0) > top:
        title += f" (last colour: {top:g} or more)"
    scale = alt.Scale(domain=[0, top], domainMid=1, clamp=True, interpolate="lab")
    legend = alt.Legend(title=title, orient="top", gradientLength=220, values=[0, 1, *range(2, int(top) + 1)])
    tips = [alt.Tooltip("domain:N"), alt.Tooltip("expert:O"), alt.Tooltip("lift:Q", format=".2f"),
            alt.Tooltip("share:Q", title="share of the expert's tokens", format=".1%"),
            alt.Tooltip("rate:Q", title="share of the domain's tokens", format=".1%")]  # fmt: skip
    chart = theme.base(rows).mark_rect().encode(
        alt.X("expert:O", title="routed expert", axis=axis, scale=alt.Scale(paddingInner=0.06)),
        alt.Y("domain:N", title=None, sort=None, scale=alt.Scale(paddingInner=0.06), axis=alt.Axis(labelLimit=130)),
        alt.Color("lift:Q", scale=scale, legend=legend),
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


def _layers(results: Results) -> Section:
    rows = [
        [f"L{each['layer']}", str(each["experts"]), str(each["experts_per_token"]), str(each["shared_experts"]),
         fixed(each["specialization"]), fixed(each["mutual_information_bits"]), fixed(each["chance_bits"], 4),
         fixed(each["stability"][-1]["overlap"], 2) if each["stability"] else NOTHING]
        for each in results["layers"]
    ]  # fmt: skip
    columns = ["Layer", "Routed experts", "Per token", "Shared", "Specialisation, mean",
               "Bits an expert tells of the domain", "Of that by chance", "Overlap, checkpoint before"]  # fmt: skip
    note = "Bits: mutual information of an assignment's expert and domain. By chance: what counts of as many "
    note += "independent assignments would show though nothing is there; a figure not well above it says nothing."
    blocks: list[Any] = [Table("Each layer", columns, rows, range(1, 8), note)]
    if (chart := specialization_chart(results)) is not None:
        blocks.append(Figure([chart], "Specialisation: a tick for each expert, a diamond for the mean of its layer."))
    if (chart := stability_chart(results)) is not None:
        blocks.append(Figure([chart], "How much of what each expert takes now it took at earlier checkpoints."))
    return Section("Layers", blocks)


def _maps(results: Results) -> list[Section]:
    maps = domain_maps(results)
    if not maps:
        return []
    if len(results["cards"]) * len(results["domains"]) > MOST_CELLS:
        text = "There are too many experts to draw their maps here; figures/ has one for each layer."
        return [Section("Domains and experts", [Text([text])])]
    text = "Lift is the domain's part of the expert's tokens divided by its part of the text: 1 is no preference."
    drawn = [Figure([chart], f"Layer {layer}: lift of each domain in each expert.") for layer, chart in maps.items()]
    return [Section("Domains and experts", [Text([text]), *drawn])]


def _made(results: Results) -> Section:
    rows = [[each["domain"], count(each["tokens"])] for each in results["domains"]]
    blocks: list[Any] = [Table("The text that was read", ["Domain", "Tokens"], rows, [1])]
    if command := results.get("command"):
        blocks += [Text(["This command makes the page again:"]), Code(str(command), "Command")]
    return Section("How it was made", blocks)
