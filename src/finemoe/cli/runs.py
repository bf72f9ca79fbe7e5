"""`finemoe runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finemoe.cli.output import Json, plain_table, print_json, print_rich

if TYPE_CHECKING:
    from rich.text import Text

    from finemoe.runs.listing import RunInfo

_NUMBERS = ("Steps", "Held out", "Size", "Date")
_GAP = 2
_LESS_WANTED = ("Date", "Size", "Model", "Kind")
"""Columns in the order in which a narrow terminal goes without them; `--json` has all."""
_COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs lie.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs, comparisons and imports: how far they are.

    A run is finished, running (some process is at work there), stopped (`finemoe resume` goes
    on), or failed (a loss was not finite). What was measured last on held-out data is a loss, in
    nats, a reward, or what else the method measures. Of a comparison, steps are its runs, and the
    loss is that of the best one; name its folder to list them. A narrow window shows fewer columns.

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

    from finemoe.charts.numbers import NOTHING, fixed

    rows = [
        {
            "Name": Text(str(one.path.relative_to(folder)) if one.path != folder else str(folder)),
            "Kind": Text(one.kind),
            "Model": Text(one.model),
            "Steps": Text(_steps(one)),
            "Held out": Text(f"{one.measures} {fixed(one.loss, 3)}" if one.measures else NOTHING),
            "State": Text(one.state, style=_COLOURS[one.state]),
            "Size": Text(_bytes(one)),
            "Date": Text(_date(one)),
        }
        for one in found
    ]
    table = plain_table()
    titles = _that_fit(rows)
    for title in titles:
        table.add_column(title, justify="right" if title in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[title] for title in titles))
    print_rich(table)
    for one in found:
        if one.message:
            typer.echo(f"{one.path} failed: {one.message}")


def _that_fit(rows: Sequence[Mapping[str, Text]]) -> list[str]:
    """The columns to show: a name is there to be copied, and others go before it is broken over several lines."""
    from rich.console import Console

    width = {title: max(len(title), *(row[title].cell_len for row in rows)) + _GAP for title in rows[0]}
    for title in _LESS_WANTED:
        if sum(width.values()) - _GAP <= Console().width:
            break
        del width[title]
    return list(width)


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
