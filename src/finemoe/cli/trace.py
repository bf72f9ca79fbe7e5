"""`finemoe trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from finemoe.cli.output import Json, number_table, print_json, print_rich


def trace(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.parquet", help="File to write; must not exist.", show_default=False)
    ],
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    tokens: Tokens = 16_384,
    length: Length = None,
    rows: Rows = 8,
    summary: Annotated[bool, typer.Option("--summary/--no-summary", help="Count loads too, and print them.")] = True,
    as_json: Json = False,
) -> None:
    """Write down where every token goes.

    One row for each token and MoE layer: domain, document, window, position, token_id, token,
    layer, expert_ids (best first), gate_weights, loss (nats of the next token) and entropy (nats
    of the router's scores). The file is streamed, so its length costs no memory, and appears once
    it is whole.

    \b
    Examples:
      finemoe trace runs/tiny --out trace.parquet
      finemoe trace runs/tiny --corpus code=src --corpus prose=docs \\
        --out trace.parquet
      duckdb -c "select layer, expert, count(*) from (
        select layer, unnest(expert_ids) expert from 'trace.parquet'
        where domain = 'code') group by all order by 3 desc"
      python -c "import pandas; print(pandas.read_parquet('trace.parquet'))"
    """
    from finemoe.analysis.reports import trace as write

    read = read_as(corpora, text_field, template, encoding)
    result = write(
        model, out, texts=texts or (), corpora=read, tokens=tokens, length=length, rows=rows, summary=summary
    )
    if as_json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from finemoe.charts.numbers import fixed

    if "summary" in result:
        found = result["summary"]
        domains = [[name, f"{tokens:,}", fixed(found["loss"].get(name))] for name, tokens in result["tokens"].items()]
        print_rich(number_table(["Domain", "tokens", "loss, nats"], domains), "")
        keys = (("max_vio", 2), ("entropy", 3), ("starved", 0), ("dead", 0))
        layers = [
            [f"layer {number}", str(layer["experts"]), *(fixed(layer[key], digits) for key, digits in keys)]
            for number, layer in found["layers"].items()
        ]
        print_rich(number_table(["", "experts", "MaxVio", "entropy of load", "starved", "dead"], layers), "")
    size = result["bytes"] / 2**20
    typer.echo(f"Rows  {result['rows']:,}, one for each token and MoE layer, {size:.1f} MiB")
    typer.echo(f"File  {result['file']}")
