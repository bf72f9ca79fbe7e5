"""Records of evaluation sets: JSON Lines, JSON, CSV, Parquet and text, plain or compressed, by suffix.

What cannot be read is reported and left out; a file that breaks off gives what came before the break.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from finemoe.core.contents import COLUMNS, WRITTEN
from finemoe.data.documents.decoding import DAMAGED, PACKED_SUFFIXES, UndecodableError, open_content
from finemoe.data.documents.document import SkipReport

_LISTS = ("data", "Data", "examples", "rows")
"""Keys under which a JSON object keeps a list of records."""


@dataclass(frozen=True)
class Record:
    """One record as it stands in its file."""

    value: Mapping[str, Any]
    where: str
    """File and place, for messages."""
    path: str
    """The file relative to the source, or the hub's configuration: tells subjects apart."""
    number: int
    """From 1, within its file."""

    @property
    def name(self) -> str:
        """Stable, and the same wherever the data lies."""
        return f"{self.path}:{self.number}"

    @property
    def stem(self) -> str:
        """The file's name without its suffixes."""
        return self.path.rsplit("/", 1)[-1].split(".")[0]


class Unreadable(Exception):
    """A record that does not hold what a task needs; the message says what is missing."""


Reader = Callable[[BinaryIO, str, SkipReport, bool], Iterator[tuple[int, Any]]]


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix that says the format and the one that says the compression, each "" where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    outer = suffixes.pop() if suffixes and suffixes[-1] in PACKED_SUFFIXES else ""
    return (suffixes[-1] if suffixes else ""), outer


def read_records(
    path: Path, name: str, report: SkipReport, header: bool = True, lines: bool = False
) -> Iterator[Record]:
    """The records of one file. `name` is its path relative to the source; `header`: a CSV's first row names columns.

    A CSV without a header gives `{"cells": [...]}`, a text file one record `{"text": ...}`, or with `lines` the JSON of
    each line.
    """
    inner, _ = kind_of(path)
    read = _json_lines if lines and inner == ".txt" else READERS.get(inner, _text)
    count = 0
    try:
        with open_content(path) as (stream, found):
            if found.kind not in WRITTEN | COLUMNS:
                report.skip(str(path), found.sentence)
                return
            for number, value in read(stream, str(path), report, header):
                count = number
                where = f"{path}:{number}"
                if isinstance(value, dict):
                    yield Record(value, where, name, number)
                else:
                    report.skip(where, f"not an object with named fields but {type(value).__name__}")
    except (*DAMAGED, UndecodableError, UnicodeError, csv.Error) as error:
        report.skip(str(path), f"damaged or unreadable after record {count}: {error}")


def text_of(record: Record, field: str, *others: str) -> str:
    """The text in `field`, or in the first of `others` that holds one.

    Raises:
        Unreadable: none of them holds text.
    """
    for name in (field, *others):
        value = record.value.get(name)
        if isinstance(value, str) and value.strip():
            return value
    known = ", ".join(list(record.value)[:12])
    raise Unreadable(f"no text in field {' or '.join((field, *others))} (fields: {known})")


def texts_of(record: Record, field: str, *others: str) -> tuple[str, ...]:
    """The list of texts in `field`, or in the first of `others` that holds one.

    Raises:
        Unreadable: none of them holds a list of texts.
    """
    for name in (field, *others):
        value = record.value.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return tuple(value)
    known = ", ".join(list(record.value)[:12])
    raise Unreadable(f"no list of texts in field {' or '.join((field, *others))} (fields: {known})")


def choice_of(value: object, num_options: int, first: int = 0) -> int:
    """The index that `value` names: a number from `first`, or a letter A, B, C ...

    Raises:
        Unreadable: it names none of the options; hidden labels (empty, -1) among them.
    """
    index = -1
    text = value.strip() if isinstance(value, str) else ""
    if isinstance(value, int) and not isinstance(value, bool):
        index = value - first
    elif len(text) == 1 and text.isalpha() and text.isascii():
        index = ord(text.upper()) - ord("A")
    elif text.isdecimal() and text.isascii():
        index = int(text) - first
    if not 0 <= index < num_options:
        raise Unreadable(f"the right answer is {value!r}, which is none of the {num_options} options")
    return index


def _json_lines(stream: BinaryIO, where: str, report: SkipReport, header: bool) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            report.skip(f"{where}:{number}", f"not a JSON line: {error}")


def _json(stream: BinaryIO, where: str, report: SkipReport, header: bool) -> Iterator[tuple[int, Any]]:
    """One document: a list, an object with a list in it, or a single record; else JSON Lines under another name."""
    content = stream.read()
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _json_lines(io.BytesIO(content), where, report, header)
        return
    if isinstance(whole, dict):
        lists = [whole[key] for key in _LISTS if isinstance(whole.get(key), list)]
        whole = lists[0] if lists else [whole]
    if isinstance(whole, list):
        yield from enumerate(whole, start=1)
    else:
        report.skip(where, f"neither a list nor an object but {type(whole).__name__}")


def _csv(stream: BinaryIO, where: str, report: SkipReport, header: bool) -> Iterator[tuple[int, Any]]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        columns = next(rows, []) if header else []
        for number, cells in enumerate(rows, start=1):
            if not cells:
                continue
            if header and len(cells) != len(columns):
                report.skip(f"{where}:{number}", f"{len(cells)} cells under {len(columns)} columns")
            else:
                yield number, dict(zip(columns, cells, strict=True)) if header else {"cells": cells}


def _parquet(stream: BinaryIO, where: str, report: SkipReport, header: bool) -> Iterator[tuple[int, Any]]:
    seekable = stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())
    number = 0
    for batch in pq.ParquetFile(seekable).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _text(stream: BinaryIO, where: str, report: SkipReport, header: bool) -> Iterator[tuple[int, Any]]:
    yield 1, {"text": stream.read().decode("utf-8-sig")}


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".py": _text,
}
