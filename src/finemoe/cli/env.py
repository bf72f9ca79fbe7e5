"""`finemoe env`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from finemoe.cli.output import Json, print_json

_BYTES = {"total", "available", "limit", "bytes", "parts"}


def env(as_json: Json = False) -> None:
    """Say what is installed, on what machine, for a report.

    Versions, processor, memory and its limits, compiler and kernels, cache, variables. Nothing
    secret: the home folder is written ~, and what looks like a password is not shown.

    \b
    Examples:
      finemoe env
      finemoe env --json
    """
    from finemoe.runs.planning.machine import env as found_here

    found = found_here()
    if as_json:
        print_json(found)
        return
    for title, value in _rows(found):
        typer.echo(textwrap.fill(value, 80, initial_indent=f"{title:<16}", subsequent_indent=" " * 16,
                                 break_long_words=False, break_on_hyphens=False))  # fmt: skip


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A title and a text for each fact; a table within becomes one text."""
    for key, value in found.items():
        title = key.replace("_", " ")
        yield title[:1].upper() + title[1:], _shown(key, value)


def _shown(key: str, value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, Mapping):
        inner = {name: _size(item) if key == "parts" else _shown(name, item) for name, item in value.items()}
        return ", ".join(
            f"{name if key == 'variables' else name.replace('_', ' ')} {item}" for name, item in inner.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return _size(value) if key in _BYTES else str(value)


def _size(value: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"
