"""`finemoe analyze knockout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_MOST_ROWS = 10


_Experiments = Annotated[
    str | None,
    typer.Option("--experiment", metavar="NAME,...", help="Of those above, with commas between; default: all."),
]
_Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", metavar="L", help="For experts, pairs and layers: only this layer; repeatable."),
]
_Experts = Annotated[
    list[int] | None,
    typer.Option("--expert", metavar="E", help="For experts and pairs: only this expert; repeatable."),
]
_Pairs = Annotated[
    int, typer.Option("--pairs", metavar="M", help="Pair the M most used experts of a layer: M(M-1)/2 pairs.")
]


def knockout(
    model: Model,
    texts: Texts = None,
    corpora: Corpora = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    experiment: _Experiments = None,
    layer: _Layers = None,
    expert: _Experts = None,
    pairs: _Pairs = 8,
    tokens: Tokens = 4096,
    length: Length = None,
    rows: Rows = 4,
    out: Report = None,
    as_json: Json = False,
) -> None:
    """Take experts away and see what the model loses.

    In nats per token, with 95 % intervals:

    \b
    masked   for every token the best 1/16 ... 4/16 of the experts are left out
             (the paper's Figure 4): the steeper the loss rises, the less others
             can stand in
    shared   the shared experts out, replaced by as many more routed ones, or not
    active   half as many active routed experts to two more than trained
             (Figure 5)
    experts  each single expert left out; --layer and --expert pick some
    pairs    of a layer's most used experts (the middle layer without --layer):
             what two cost together beyond each alone; above 0 they cover for
             each other
    layers   the routed part, the shared part or both of each layer left out

    Differences from the intact model are paired by window. Ctrl-C keeps the experiments that are
    done.

    \b
    Examples:
      finemoe analyze knockout runs/tiny --experiment masked,shared,active
      finemoe analyze knockout runs/mix --corpus english=en.jsonl \\
        --corpus python=src/ --out knockout
      finemoe analyze knockout runs/mix --experiment experts --layer 2 --json
      finemoe analyze knockout runs/mix --experiment pairs --layer 2 --expert 3 \\
        --expert 17
    """
    from finemoe.analysis import reports

    names = None if experiment is None else [name.strip() for name in experiment.split(",") if name.strip()]
    read = read_as(corpora, text_field, template, encoding)
    results = reports.knockout(
        model, names, texts=texts or (), corpora=read, tokens=tokens, length=length, rows=rows,
        layers=layer or None, experts=expert or None, pairs=pairs, out=out,
    )  # fmt: skip
    deliver(results, out if results["experiments"] else None, as_json, _print)
    if not results["complete"]:
        from finemoe.core.logs import console

        console().print("Interrupted: the experiments that were done are whole, the others were not run.", markup=False)
        raise typer.Exit(130)


def _print(results: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.charts.numbers import fixed

    if results["intact"] is None:
        return
    text = results["text"]["domains"]
    counted = sum(domain["tokens"] for domain in text.values())
    print_rich(
        f"Intact loss {fixed(results['intact']['loss']['mean'])} nats per token; {counted:,} tokens of "
        f"{', '.join(text)}. Rises are paired differences with 95 % intervals over windows.",
    )
    for name, made in results["experiments"].items():
        print_rich(Text(), _TABLES.get(name, _plain)(name, made["records"]))
        for note in made["notes"]:
            print_rich(Text(f"Left out: {note}."))
    for name, reason in results["skipped"].items():
        print_rich(Text(f"\nNot run: {name}: {reason}."))


def _table(title: str, columns: Sequence[str]) -> Any:
    table = plain_table((0, 1), show_edge=True, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _plain(name: str, found: Sequence[Mapping[str, Any]]) -> Any:
    from finemoe.charts.knockout.words import change
    from finemoe.charts.numbers import fixed

    titles = {
        "masked": "The best experts of each token masked (Figure 4)",
        "shared": "Without the shared experts",
        "active": "Active routed experts (Figure 5)",
        "layers": "Without the experts of one layer",
    }
    table = _table(titles[name], ("", "loss", "rise"))
    for one in found:
        table.add_row(one["label"], fixed(one["loss"]["mean"]), change(one["difference"]))
    return table


def _experts(name: str, found: Sequence[Mapping[str, Any]]) -> Any:
    from finemoe.charts.knockout.words import by_size, change

    shown = by_size(found)[:_MOST_ROWS]
    table = _table(f"Single experts: the {len(shown)} of {len(found)} that are missed most", ("", "load", "rise"))
    for one in shown:
        label = f"layer {one['layer']}, expert {one['expert']}"
        table.add_row(label, f"{100 * one['share']:.2f} %", change(one["difference"], 4))
    return table


def _pairs(name: str, found: Sequence[Mapping[str, Any]]) -> Any:
    from finemoe.charts.knockout.words import by_size, change, verdict

    ranked = by_size(found, "interaction")
    shown = ranked if len(ranked) <= _MOST_ROWS else [*ranked[: _MOST_ROWS // 2], *ranked[-_MOST_ROWS // 2 :]]
    title = f"Pairs: the {len(shown)} of {len(found)} that interact most"
    table = _table(title, ("", "interaction", "verdict"))
    for one in shown:
        i, j = one["experts"]
        table.add_row(f"layer {one['layer']}, {i} and {j}", change(one["interaction"], 5), verdict(one["interaction"]))
    return table


_TABLES = {"experts": _experts, "pairs": _pairs}
