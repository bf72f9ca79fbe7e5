"""`finemoe analyze load`."""

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
from finemoe.cli.output import Json, deliver, number_table, print_rich


def load(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help=MODEL, show_default=False, autocompletion=complete_run),
    ],
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    tokens: Tokens = 16_384,
    length: Length = None,
    rows: Rows = 8,
    last: Annotated[bool, typer.Option("--last", help="Of a run only the newest checkpoint.")] = False,
    out: Report = None,
    as_json: Json = False,
) -> None:
    """Say how evenly the experts are used.

    By layer, by domain, together, over training. A run directory stands for all its kept
    checkpoints, oldest first; several models are a series in the order given. Every model reads
    the same text. What the run's validations recorded is shown beside them.

    MaxVio is (largest load - mean load) / mean load: 0 is even. Starved experts get less than a
    tenth of an even share, dead ones nothing. When a layer has stopped using its experts, this
    says so in the words of `finemoe train`, with the knob that helps.

    \b
    Examples:
      finemoe analyze load runs/tiny
      finemoe analyze load runs/tiny --corpus code=src --corpus prose=docs \\
        --out reports/load
      finemoe analyze load runs/tiny --last --json
    """
    from finemoe.analysis import reports

    read = read_as(corpora, text_field, template, encoding)
    results = reports.load(
        models,
        texts=texts or (),
        corpora=read,
        tokens=tokens,
        length=length,
        rows=rows,
        last=last,
        out=out,
    )
    deliver(results, out, as_json, _print)


def _print(results: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.charts.load.words import summary
    from finemoe.charts.numbers import fixed

    series, columns = results["series"], ["MaxVio", "in a batch", "entropy", "CV", "starved", "dead"]
    keys = (("max_vio", 2), ("max_vio_batch", 2), ("entropy", 3), ("variation", 2), ("starved", 0), ("dead", 0))
    if len(series) > 1:
        shown = [[one["name"], *(fixed(one[key], digits) for key, digits in keys)] for one in series]
        print_rich(number_table(["Mean or sum", *columns], shown), "")
    last = series[-1]
    by_layer = [
        [f"layer {number}, {layer['experts_per_token']} of {layer['experts']}", *_row(layer, keys)]
        for number, layer in last["layers"].items()
    ]
    print_rich(number_table([last["name"], *columns], by_layer), "")
    for line in summary(results):
        print_rich(Text(line))


def _row(layer: Mapping[str, Any], keys: Any) -> list[str]:
    from finemoe.charts.numbers import fixed

    return [fixed(layer[key], digits) for key, digits in keys]
