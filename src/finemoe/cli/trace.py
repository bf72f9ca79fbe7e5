"""`finemoe trace`."""

from __future__ import annotations

from collections.abc import Iterable
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
      finemoe trace runs/tiny --corpus code=src --corpus prose=docs --out trace.parquet
      duckdb -c "select layer, expert, count(*) from (select layer, unnest(expert_ids) expert
                 from 'trace.parquet' where domain = 'code') group by all order by 3 desc"
      python -c "import pandas; print(pandas.read_parquet('trace.parquet').head())"
    """
    _check_out(out)

    from finemoe.analysis.load import Tally, figures
    from finemoe.analysis.passages import observe, read_passages, require_experts
    from finemoe.analysis.provenance import made_by
    from finemoe.analysis.trace import trace_info, write_trace
    from finemoe.checkpoint.language_model import open_language_model
    from finemoe.training.alerts import routed_layers

    opened = open_language_model(model)
    require_experts(opened)
    read = read_as(corpora, text_field, template, encoding)
    passages = read_passages(opened, texts=texts or (), corpora=read, tokens=tokens, length=length)
    counted = Tally(routed_layers(opened.model.config), pairs=False)
    about = made_by()
    observed = observe(opened, passages, rows=rows, description="tracing")
    _count(write_trace(out, opened, passages, observed, about), counted if summary else None)
    info = trace_info(out)
    result: dict[str, Any] = {
        "kind": "trace", "schema": info.metadata["version"], "file": str(out), "rows": info.rows,
        "bytes": out.stat().st_size, "tokens": info.metadata["domains"], "model": str(model), **about,
    }  # fmt: skip
    if summary:
        result["summary"] = figures(opened, counted)
    if as_json:
        print_json(result)
    else:
        _print(result)


def _count(observed: Iterable[Any], counted: Any) -> None:
    for one in observed:
        if counted is not None:
            counted.add(one)


def _check_out(out: Path) -> None:
    """Before any work.

    Raises:
        ConfigError: the file is there, or is a folder.
    """
    from finemoe.core.errors import ConfigError

    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, such as {out / 'trace.parquet'}")
    if out.exists():
        raise ConfigError(f"--out {out} exists; nothing is overwritten: remove it, or choose another name")


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
