"""The page of `finemoe analyze experts`: an overview of all experts, a search, a card for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finemoe.charts.cards.figures import domain_maps, specialization_chart, stability_chart
from finemoe.charts.cards.words import leading
from finemoe.charts.numbers import NOTHING, Results, clean, count, finite, fixed
from finemoe.charts.page import Bullets, Code, Figure, Section, Table, Text, Widget, render_page
from finemoe.charts.words import footer

MOST_CELLS = 6000  # of heat maps on the page; more of them are slow to draw, and figures/ has them all
SCRIPT = Path(__file__).with_name("experts")  # .js and .css

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
        Section("Experts", [Widget(SCRIPT, widget_data(results), "Expert cards, with a search")]),
        _layers(results),
        *_maps(results),
        Section("How to read this", [Bullets([*_READING, f"Tokens shown: {results['token_rule']}."])]),
        _made(results),
    ]
    return render_page(
        f"Expert cards: {results['model']['source']}",
        sections,
        subtitle=subtitle,
        footer=footer(results.get("finemoe_version")),
    )


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


def _short(value: Any) -> float | None:
    number = finite(value)
    return None if number is None else float(f"{number:.3g}")


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
