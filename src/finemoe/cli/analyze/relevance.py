"""`finemoe analyze relevance`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from finemoe.cli.analyze.options import (
    Corpora,
    Encoding,
    Length,
    Model,
    Rows,
    Template,
    TextField,
    Texts,
    Tokens,
    read_as,
)
from finemoe.cli.output import Json, deliver, plain_table, print_rich

_Score = Annotated[
    Literal["gate", "token"],
    typer.Option("--score", help="gate: by gate weights; token: by how many tokens choose the expert."),
]
_Share = Annotated[
    float | None,
    typer.Option("--p", metavar="P", help="Relevance to reach in each layer; default: 0.1 for gate, 0.2 for token."),
]
_Selection = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="File for the selection, JSON; only an older selection is replaced."),
]
_Report = Annotated[
    Path | None, typer.Option("--report", metavar="DIR", help="Folder for results.json, report.html and figures/.")
]


def relevance(
    model: Model,
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    score: _Score = "gate",
    p: _Share = None,
    tokens: Tokens = 131_072,
    length: Length = None,
    rows: Rows = 4,
    out: _Selection = None,
    report: _Report = None,
    as_json: Json = False,
) -> None:
    """Find the experts that a task needs (ESFT).

    They are written down for expert tuning. Every expert of every layer gets the mean of its gate
    weights over the task's tokens, and the share of tokens that choose it; both are means over
    samples of the model's length. Selected are the fewest experts of each layer whose scores
    reach P of the layer's sum. All texts given count as one task.

    \b
    Examples:
      finemoe analyze relevance runs/mix --corpus task=task.jsonl \\
        --out selection.json
      finemoe analyze relevance runs/mix --corpus task=task.jsonl --score token \\
        --p 0.3 --report relevance
    """
    from finemoe.core.errors import ConfigError

    if p is not None and not 0 < p <= 1:
        raise ConfigError(f"--p {p}: must be above 0 and at most 1, a share of each layer's relevance")

    from finemoe.analysis import reports

    read = read_as(corpora, text_field, template, encoding)
    results = reports.relevance(
        model, texts=texts or (), corpora=read, tokens=tokens, length=length, rows=rows,
        score=score, p=p, selection=out, out=report,
    )  # fmt: skip
    deliver(results, report, as_json, lambda found: _print(found["selection"], out))


def _print(selection: Mapping[str, Any], out: Path | None) -> None:
    from finemoe.charts.numbers import count

    table = plain_table((0, 1), show_edge=True)
    for name in ("layer", "experts", "reached"):
        table.add_column(name, justify="right")
    table.add_column("which, best first")
    for layer in selection["layers"]:
        reached = f"{100 * sum(layer['scores']):.1f} %"
        table.add_row(str(layer["layer"]), str(len(layer["experts"])), reached, " ".join(map(str, layer["experts"])))
    total = sum(len(layer["experts"]) for layer in selection["layers"])
    of = sum(selection["model"]["experts"].values())
    print_rich(
        f"{selection['score']} score, p = {selection['p']:g}: {total} of {of} routed experts, "
        f"{count(selection['trainable_parameters'])} parameters, {100 * selection['trainable_share']:.2f} % of the "
        f"model; {selection['samples']} samples, {selection['tokens']:,} tokens",
        table,
    )
    if out is not None:
        typer.echo(f"\nSelection  {out}")
