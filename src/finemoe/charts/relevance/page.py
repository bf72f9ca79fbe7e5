"""The report of `finemoe analyze relevance` as one HTML page."""

from __future__ import annotations

from finemoe.charts.numbers import Results, clean, count
from finemoe.charts.page import Code, Figure, Section, Table, Text, render_page
from finemoe.charts.relevance.figures import relevance_chart
from finemoe.charts.words import footer, model_and_text


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
    ]
    if command := results.get("command"):
        sections.append(Section("How it was measured", [Code(str(command), "The command")]))
    return render_page(
        "The experts a task needs",
        sections,
        subtitle=model_and_text(results),
        footer=footer(results.get("finemoe_version")),
    )


def _named(experts: list[int]) -> str:
    return ", ".join(map(str, experts))
