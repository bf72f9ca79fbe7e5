"""Rows of separated values, as people and programs write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

DELIMITERS = ",;\t|"
_NAME = re.compile(r"[^\W\d][\w.-]{0,60}")
_HEAD, _LOOKED_AT = 1 << 16, 20


def heads_a_table(data: bytes, wanted: Sequence[str]) -> bool:
    """Whether `data` begins with a row of names, among them those `wanted`, and goes on in rows of as many cells."""
    lines = data[:_HEAD].decode("utf-8", "ignore").splitlines(keepends=True)
    if len(data) > _HEAD:
        lines.pop()
    for delimiter in DELIMITERS:
        names = [name.strip().strip('"') for name in lines[0].split(delimiter)] if lines else []
        if len(names) < 2 or not set(wanted) <= set(names) or not all(_NAME.fullmatch(name) for name in names):
            continue
        rows = list(rows_of(iter(lines), delimiter))[1:_LOOKED_AT]
        if rows and all(row is not None and len(row) == len(names) for row in rows):
            return True
    return False


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
