"""What `finemoe import` and `finemoe export` share: how both report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import print_rich, printable

if TYPE_CHECKING:
    pass

Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Compare every tensor again, and a random twin's logits with transformers' where it is installed.",
    ),
]


def show_size(size: dict[str, int]) -> str:
    """Parameters in words."""
    from finemoe.charts.numbers import count

    more = f", {count(size['mtp_parameters'])} more for multi-token prediction" if size["mtp_parameters"] else ""
    return f"{count(size['total_parameters'])}, {count(size['active_parameters'])} active{more}"


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Titles and texts in two columns on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True, min_width=19)
    table.add_column(overflow="fold")
    for title, text in lines:
        table.add_row(Text(title, "bold"), Text(printable(text)))
    print_rich(table)


def print_checks(checks: list[dict[str, Any]]) -> None:
    """A line for each check."""
    words = {True: "verified", False: "NOT VERIFIED", None: "not checked"}
    print_lines((f"{words[check['sound']]}: {check['name']}", check["said"]) for check in checks)


def fail_unless_sound(checks: list[dict[str, Any]]) -> None:
    """End with status 1 where a check failed, after saying so.

    Raises:
        typer.Exit: 1.
    """
    from finemoe.core.logs import logger

    failed = [check["name"] for check in checks if check["sound"] is False]
    if failed:
        logger.error("verification failed: %s; do not use what was written", ", ".join(failed))
        raise typer.Exit(1)
