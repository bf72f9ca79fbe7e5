"""`finemoe analyze difference`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.analyze.options import (
    MODEL,
    Corpora,
    Encoding,
    Length,
    Report,
    Rows,
    Template,
    TextField,
    Texts,
    Tokens,
    read_as,
)
from finemoe.cli.completion import complete_run
from finemoe.cli.output import Json, deliver, plain_table, print_rich

_Before = Annotated[Path, typer.Argument(metavar="A", help=MODEL, show_default=False, autocompletion=complete_run)]
_After = Annotated[
    Path,
    typer.Argument(metavar="B", help="The one to compare it with.", show_default=False, autocompletion=complete_run),
]


def difference(
    before: _Before,
    after: _After,
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    tokens: Tokens = 16_384,
    length: Length = None,
    rows: Rows = 8,
    out: Report = None,
    as_json: Json = False,
) -> None:
    """Compare the routing of two checkpoints.

    On the same tokens, before and after fine-tuning, reinforcement learning or pruning, or two
    moments of one run. It says, layer by layer and domain by domain, which choices of experts
    changed, whether the router or what it reads changed them, which experts gained or lost
    load, and what became of the loss. Experts are matched by number; where B has fewer, by
    their weights.

    \b
    Examples:
      finemoe analyze difference runs/mix/checkpoints/step-00000240 runs/mix \\
        --out difference
      finemoe analyze difference runs/base runs/tuned --corpus law=law.jsonl \\
        --corpus code=src/
      finemoe analyze difference runs/base runs/tuned --json \\
        | jq '.layers[].domains.all'
    """
    from finemoe.analysis import reports

    read = read_as(corpora, text_field, template, encoding)
    results = reports.difference(
        before,
        after,
        texts=texts or (),
        corpora=read,
        tokens=tokens,
        length=length,
        rows=rows,
        out=out,
    )
    deliver(results, out, as_json, _print)


def _print(results: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.charts.difference.words import summary
    from finemoe.charts.numbers import clean

    results = clean(results)
    parts: list[Any] = [*map(Text, summary(results)), "", _layer_table(results), "", _domain_table(results)]
    print_rich(*parts)


def _layer_table(results: Mapping[str, Any]) -> Any:
    from finemoe.charts.numbers import fixed

    table = _table("Layer", "Choices changed", "Any change", "First choice", "Gate shift", "Router", "States")
    for each in results["layers"]:
        found = each["domains"]["all"]
        shares = [found["flip_rate"]["mean"], found["any_change"], found["top1_flip_rate"]]
        causes = [found["flip_rate_router"], found["flip_rate_states"]]
        first, last = ([f"{100 * share:.1f} %" for share in part] for part in (shares, causes))
        table.add_row(f"L{each['layer']}", *first, fixed(found["gate_shift"]), *last)
    return table


def _domain_table(results: Mapping[str, Any]) -> Any:
    from rich.text import Text

    from finemoe.charts.numbers import NOTHING, fixed

    table = _table("Domain", "Choices changed", "Loss before", "After", "Difference", "95 % interval")
    for each in results["domains"]:
        flips = [layer["domains"][each["domain"]]["flip_rate"]["mean"] for layer in results["layers"]]
        moved = each["difference"]
        span = NOTHING if moved["low"] is None else f"{fixed(moved['low'])} to {fixed(moved['high'])}"
        losses = (fixed(each["loss_a"]), fixed(each["loss_b"]), fixed(moved["mean"]))
        table.add_row(Text(each["domain"]), f"{100 * sum(flips) / len(flips):.1f} %", *losses, span)
    return table


def _table(first: str, *others: str) -> Any:
    table = plain_table()
    table.add_column(first, no_wrap=True, overflow="ellipsis", max_width=18)
    for title in others:
        table.add_column(title, justify="right")
    return table
