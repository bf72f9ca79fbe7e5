"""Rows of separated values, as people and programs write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator


def rows_of(lines: Iterator[str], delimiter: str) -> Iterator[list[str] | None]:
    """The cells of each row; None for a line that is none, as its quotation marks do not match.

    A quoted cell may hold line ends. Where no cell begins with a mark, marks are characters like others; so they are
    in rows whose marks make no sense, or are never closed: many programs write tables so.
    """
    width, kept = 0, list[str]()
    for line in lines:
        plain = _plain(line, delimiter)
        if not kept and not any(cell.startswith('"') for cell in plain):
            width = width or len(plain)
            yield plain
            continue
        kept.append(line)
        if '"' not in line:
            continue  # nothing that could close the cell
        try:
            cells = next(csv.reader(io.StringIO("".join(kept), newline=""), delimiter=delimiter, strict=True))
            width = width or len(cells)
            yield cells
        except csv.Error as error:
            if "unexpected end" in str(error):
                continue
            yield from _as_they_stand(kept, delimiter, width)
        kept = []
    yield from _as_they_stand(kept, delimiter, width)


def _as_they_stand(lines: Iterable[str], delimiter: str, width: int) -> Iterator[list[str] | None]:
    for line in lines:
        plain = _plain(line, delimiter)
        yield plain if len(plain) in (0, width) else None


def _plain(line: str, delimiter: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split(delimiter) if line else []
