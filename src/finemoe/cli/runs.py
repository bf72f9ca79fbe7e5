"""`finemoe runs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finemoe.cli.output import Json, plain_table, print_json, print_rich

if TYPE_CHECKING:
    from finemoe.runs.listing import RunInfo

_COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs lie.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs, comparisons and imports, and how far they came.

    A run is finished, running (some process is at work there), stopped (`finemoe resume` goes
    on), or failed (a loss was not finite). Of a comparison, steps are its runs, and the loss is
    that of the best one; name its folder to list them.

    \b
    Examples:
      finemoe runs
      finemoe runs runs/demo
      finemoe runs --json | jq '.[] | select(.state == "stopped") | .path'
    """
    from finemoe.runs.listing import list_runs

    found = list_runs(folder)
    if as_json:
        print_json([one.to_dict() for one in found])
    elif not found:
        typer.echo(f"{folder} holds no runs; `finemoe train RECIPE` makes one")
    else:
        _print_table(folder, found)


def _print_table(folder: Path, found: Sequence[RunInfo]) -> None:
    from rich.text import Text

    from finemoe.charts.numbers import fixed

    table = plain_table()
    table.add_column("Name", overflow="fold")
    table.add_column("Kind", no_wrap=True)
    table.add_column("Model", overflow="fold")
    for title in ("Steps", "Held out"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("State", no_wrap=True)
    for title in ("Size", "Date"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in found:
        name = str(one.path.relative_to(folder)) if one.path != folder else str(folder)
        state = Text(one.state, style=_COLOURS[one.state])
        table.add_row(
            Text(name), one.kind, Text(one.model), _steps(one), fixed(one.loss, 3), state, _bytes(one), _date(one)
        )
    print_rich(table)
    for one in found:
        if one.message:
            typer.echo(f"{one.path} failed: {one.message}")


def _steps(one: RunInfo) -> str:
    if one.done is None:
        return ""
    return f"{one.done}" if one.planned in (None, one.done) else f"{one.done}/{one.planned}"


def _bytes(one: RunInfo) -> str:
    if one.bytes >= 1 << 30:
        return f"{one.bytes / 2**30:.1f}G"
    return f"{one.bytes / 2**20:.0f}M" if one.bytes >= 1 << 20 else f"{-(-one.bytes // 1024)}K"


def _date(one: RunInfo) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(one.changed))
