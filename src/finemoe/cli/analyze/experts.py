"""`finemoe analyze experts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from finemoe.cli.analyze.options import (
    Corpora,
    Encoding,
    Length,
    Model,
    Report,
    Rows,
    Template,
    TextField,
    Texts,
    Tokens,
    read_as,
)
from finemoe.cli.output import Json, deliver, plain_table, print_rich

_MOST_ROWS = 12
_FEWEST = 0.25  # times the uniform load: what took less is no example of specialisation


def experts(
    model: Model,
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    tokens: Tokens = 16_384,
    length: Length = None,
    rows: Rows = 8,
    stability: Annotated[
        bool, typer.Option("--stability/--no-stability", help="Compare with the run's earlier checkpoints.")
    ] = True,
    out: Report = None,
    as_json: Json = False,
) -> None:
    """Make a card for every routed expert.

    A card says the expert's load, the tokens and contexts it takes most (by gate weight, against
    how common they are), its share of each domain, how specialised that is (0: takes of every
    domain alike, 1: of one alone), how much of it it took at earlier checkpoints of the run, and
    its nearest experts by router, by weights and by being taken together.

    \b
    Examples:
      finemoe analyze experts runs/tiny --out cards
      finemoe analyze experts runs/mix --corpus english=en.jsonl \\
        --corpus python=src/ --out cards
      finemoe analyze experts runs/mix --json \\
        | jq '.cards[] | select(.specialization > 0.5)'

    With --out, report.html has all cards with a search; it is one file and works offline.
    """
    from finemoe.analysis import reports

    results = reports.experts(
        model,
        texts=texts or (),
        corpora=read_as(corpora, text_field, template, encoding),
        tokens=tokens,
        length=length,
        rows=rows,
        stability=stability,
        out=out,
    )
    deliver(results, out, as_json, _print)


def _print(results: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.charts.cards.words import leading
    from finemoe.charts.numbers import clean, count, fixed

    results = clean(results)
    several = len(results["domains"]) > 1
    layers = plain_table()
    for title in ("Layer", "Experts", "Per token", "Specialisation", "Bits of domain", "by chance"):
        layers.add_column(title, justify="right")
    for each in results["layers"]:
        measured = (
            fixed(each["specialization"]),
            fixed(each["mutual_information_bits"]),
            fixed(each["chance_bits"], 4),
        )
        layers.add_row(f"L{each['layer']}", str(each["experts"]), str(each["experts_per_token"]), *measured)
    cards = [card for card in results["cards"] if card["relative_load"] >= _FEWEST]
    cards.sort(key=lambda card: -(card["specialization"] if several else card["relative_load"]))
    table = plain_table()
    for title, width in (("Expert", 7), ("Load", 5), ("Spec.", 5), ("Domain", 11), ("Tokens, by lift", 42)):
        side: Any = "right" if title in ("Load", "Spec.") else "left"
        table.add_column(title, width=width, justify=side, no_wrap=True, overflow="ellipsis")
    for card in cards[:_MOST_ROWS]:
        lead = leading(card)
        domain = "" if lead is None else str(results["domains"][lead]["domain"])
        words = "  ".join(token["text"] for token in card["tokens"])
        name = f"L{card['layer']} E{card['expert']}"
        table.add_row(
            name, fixed(card["relative_load"], 2), fixed(card["specialization"], 2), Text(domain), Text(words)
        )
    read = f"{len(results['domains'])} domain{'s' if several else ''}"
    text = f"{len(results['cards'])} experts, {count(results['tokens'])} tokens of {read}."
    by = "most specialised" if several else "most used"
    also = f" with a load of at least {_FEWEST:g} times uniform" if several else ""
    lead_in = f"The {min(_MOST_ROWS, len(cards))} {by}{also}:"
    print_rich(text, "", layers, "", lead_in, "", table)
