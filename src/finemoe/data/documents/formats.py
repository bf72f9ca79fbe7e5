"""Files to documents: text, JSON Lines, JSON, CSV, Parquet and Arrow, each as it is or packed, told by their content.

Everything is read as bytes and decoded strictly: line ends stay what they are, and only a line feed ends a JSON line.
What cannot be read is reported and left out; what was read before a file broke off is kept. A suffix decides only what
content cannot tell: a table in a .csv, and whether something broken was meant as JSON.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from finemoe.core.contents import COLUMNS, Contents
from finemoe.core.errors import DataError
from finemoe.data.documents.decoding import DAMAGED, PACKED_SUFFIXES, UndecodableError, checked, open_content
from finemoe.data.documents.document import Document, SkipReport
from finemoe.data.documents.fields import ABSENT, Fields, NoTextError, TextFields, shown, steps_of, value_at
from finemoe.data.documents.records import records_in
from finemoe.data.documents.separated import DELIMITERS, heads_a_table, rows_of
from finemoe.data.documents.tables import without_added

_JSON_CHUNK = 1 << 20
_LONGEST_CELL = (1 << 31) - 1
_TABLES = frozenset({".csv", ".tsv", ".tab", ".psv"})
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|authors|contributing|code_of_conduct|dataset_?card)"
    r"([-_.].*)?|_SUCCESS|(md5|sha(1|256|512))(sums?)?(\.txt)?",
    re.IGNORECASE,
)
_SAID = re.compile(r"sep=([,;\t|])\r?\n?")  # as Excel writes it
_MARKUP_SUFFIXES = frozenset({".html", ".htm", ".xhtml", ".xml"})
_PLAIN = frozenset({"", ".md", ".txt", ".rst", ".markdown", ".cff"})


@dataclass(frozen=True)
class TextFile:
    """A file to read: where it is, its stable name, its texts' domain, and what to read of it."""

    path: Path
    name: str
    domain: str
    fields: Fields = field(default_factory=TextFields)
    domain_field: str | None = None
    encoding: str = "utf-8"
    named: bool = False
    """The user named this very file, so it is meant; else it was found in a folder."""

    @property
    def suffix(self) -> str:
        """That of the content, in small letters."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        while suffixes and suffixes[-1] in PACKED_SUFFIXES:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""


Reader = Callable[[BinaryIO, TextFile, SkipReport], Iterator[Document]]


def read_file(file: TextFile, report: SkipReport) -> Iterator[Document]:
    """The documents of `file`: one for a text file, one a record for everything that has records.

    Raises:
        DataError: the user named this file, and it is nothing to train on.
    """
    if not file.named and file.suffix in _PLAIN and _ABOUT.fullmatch(file.path.name):
        report.leave_out(str(file.path), "about the data", unfit=False)
        return
    try:
        with open_content(file.path, file.encoding) as (stream, found):
            if found.kind == "text" and file.suffix in _MARKUP_SUFFIXES:
                found = Contents("markup", f"markup ({file.suffix})", "take the text out of it first")
            if found.kind == "json" and file.suffix == ".ipynb":
                found = Contents("markup", "a notebook", "take the text out of its cells first")
            read = _reader(found, file)
            if read is not None:
                yield from read(stream, file, report)
            elif found.kind in ("pointer", "wide") or (found.kind == "text" and not file.named):
                report.skip(str(file.path), _refusal(found, file))
            elif file.named:
                raise DataError(f"corpus file {file.path}: {_refusal(found, file)}")
            else:
                report.leave_out(str(file.path), found.what, unfit=found.kind not in ("media", "program", "binary"))
    except UndecodableError as error:
        report.skip(str(file.path), str(error))
    except DAMAGED as error:
        report.skip(str(file.path), f"damaged or unreadable: {error}")


def read_text_file(file: TextFile, report: SkipReport) -> Iterator[Document]:
    """The one document of a file that is known to be plain text."""
    try:
        with file.path.open("rb") as stream:
            yield from _read_text(stream, file, report)
    except UndecodableError as error:
        report.skip(str(file.path), str(error))
    except OSError as error:
        report.skip(str(file.path), f"damaged or unreadable: {error}")


def no_records(kind: str, whole: bool) -> None:
    """Refuse to take a corpus of plain texts for one of records.

    Raises:
        DataError: `whole` records are asked for.
    """
    if whole:
        raise DataError(f"a corpus of kind `{kind}` holds plain texts, and conversations are records: name files that "
                        'hold them, as data.corpus = {kind = "files", paths = ["chats.jsonl"]}')  # fmt: skip


def _refusal(found: Contents, file: TextFile) -> str:
    if found.kind == "text":
        return f"its name says {file.suffix}, but it is text of another kind: mend it, or give it another suffix"
    if found.kind == "wide":
        return f'{found.what}: set `data.corpus.encoding = "{found.encoding}"`, or save it as UTF-8'
    return found.sentence


def _reader(found: Contents, file: TextFile) -> Reader | None:
    """What reads such content; None: it is nothing to train on."""
    if found.kind in COLUMNS:
        return _read_arrow if found.kind != "parquet" else _read_parquet
    if found.kind == "json-lines" or (found.kind == "text" and file.suffix in (".jsonl", ".ndjson")):
        return _read_json_lines
    if found.kind == "json" or (found.kind == "text" and file.suffix == ".json"):
        return _read_json
    if found.kind not in ("text", "empty") or file.suffix in (".parquet", ".arrow", ".feather"):
        return None if found.kind != "empty" else _read_text
    return _read_table if file.suffix in _TABLES else _read_text_or_table


def _read_text(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError("utf-8", error.start, error) from error
    yield Document(file.name, file.domain, text)


def _read_text_or_table(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    """A text, or a table under any name: one whose first line names the columns that were asked for."""
    data = stream.read()
    wanted = [steps_of(name)[0] for name in file.fields.names]
    table = bool(wanted) and heads_a_table(data, wanted)
    yield from (_read_table if table else _read_text)(io.BytesIO(data), file, report)


def _read_json_lines(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    end = 0
    for number, line in enumerate(stream, start=1):
        end += len(line)
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            # A mark stands within files that were put together, a comma after the items of a list without brackets.
            record = json.loads(line.decode("utf-8").lstrip("\ufeff").rstrip().removesuffix(","))
        except UnicodeDecodeError as error:
            report.skip(where, f"not a JSON line: {UndecodableError('utf-8', end - len(line) + error.start, error)}")
        except (ValueError, RecursionError) as error:
            report.skip(where, f"not a JSON line: {error}")
        else:
            yield from _record(record, file, number, where, report)


def _record(value: Any, file: TextFile, number: int, where: str, report: SkipReport) -> Iterator[Document]:
    """The document in one JSON value: a text by itself, or a record."""
    if isinstance(value, str) and file.fields.template is None:
        value = {file.fields.text_field: value}
    if isinstance(value, dict):
        yield from record_document(value, file, number, where, report)
    else:
        report.skip(where, f"not a JSON object but {type(value).__name__}")


def _read_json(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    """A list of records, one object with a list in it, or objects one after the other."""
    values = _json_values(checked(stream))
    number, held = 0, None
    try:
        for number, (value, alone) in enumerate(values, start=1):
            if number == 1 and alone and isinstance(value, dict):
                held = value  # alone so far: perhaps all that there is
                continue
            if held is not None:
                yield from _record(held, file, 1, f"{file.path}:1", report)
                held = None
            yield from _record(value, file, number, f"{file.path}:{number}", report)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        report.skip(f"{file.path}:{number + 1}", f"not JSON from here on: {problem}")
    if held is not None:
        yield from _only_object(held, file, report)


def _only_object(value: dict[str, Any], file: TextFile, report: SkipReport) -> Iterator[Document]:
    """The documents of a JSON file that is a single object."""
    names = file.fields.names
    records = records_in(value, names, file.named)
    lacks = [name for name in names if steps_of(name)[0] not in value and name not in value]
    if records:
        for number, record in enumerate(records, start=1):
            yield from _record(record, file, number, f"{file.path}:{number}", report)
    elif lacks and not file.named:
        report.beside.add(value, names)
        report.leave_out(str(file.path), f"a JSON object without `{lacks[0]}`", unfit=True)
    else:
        yield from _record(value, file, 1, f"{file.path}:1", report)


def _json_values(stream: BinaryIO) -> Iterator[tuple[Any, bool]]:
    """The items of JSON lists, or the values of a file one after the other; with each, whether it is of the second
    kind. The file need not fit in memory, only each value.

    Raises:
        ValueError: something is no JSON.
    """
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")()
    text, at, chunk, listed, ended = "", 0, _JSON_CHUNK, False, False
    first, closed = True, False
    while True:
        at = _past_blanks(text, at, "" if first or not listed else ",")
        if first and text[at : at + 1] == "[":
            listed, at, first = True, at + 1, False
            continue
        if listed and text[at : at + 1] == "]":
            listed, at, first, closed = False, at + 1, True, True  # perhaps another follows
            continue
        if closed and first and text[at : at + 1]:
            raise ValueError("there is more after the end of the list")
        try:
            value, end = decode(text, at)
            if end < len(text) or ended:  # else it may go on
                yield value, not listed
                at, first = end, False
                continue
        except json.JSONDecodeError:
            if ended and text[at:].strip():
                raise
        if ended:
            if listed:
                raise ValueError("the list has no end")
            return
        data = stream.read(chunk)
        ended, chunk = not data, chunk * 2 if at == 0 else _JSON_CHUNK
        text, at = text[at:] + utf8.decode(data, final=ended), 0


def _past_blanks(text: str, at: int, also: str) -> int:
    while at < len(text) and (text[at].isspace() or text[at] == "\ufeff" or text[at] in also):
        at += 1
    return at


def _read_table(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    """Rows of separated values under a row of names."""
    csv.field_size_limit(_LONGEST_CELL)
    with io.TextIOWrapper(checked(stream), encoding="utf-8", newline="") as text:
        head = text.readline()
        if said := _SAID.fullmatch(head):
            head, delimiter = text.readline(), said[1]
        else:
            delimiter = max(DELIMITERS, key=lambda mark: (head.count(mark), mark == "\t" and file.suffix != ".csv"))
        rows = rows_of(_after(head, text), delimiter)
        names = [name.strip() for name in next(rows, None) or ()]
        if _check_columns(file, names, report, "; the first row must hold the names of the columns") is None:
            return
        for number, cells in enumerate(rows, start=1):
            where = f"{file.path}:{number}"
            if cells is None:
                report.skip(where, "quotation marks do not match")
            elif cells and len(cells) != len(names):
                report.skip(where, f"{len(cells)} cells under {len(names)} names")
            elif cells:
                yield from record_document(dict(zip(names, cells, strict=True)), file, number, where, report)


def _after(head: str, rest: Iterator[str]) -> Iterator[str]:
    yield head
    yield from rest


def _read_parquet(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    # Parquet is read from its end: a compressed one has to be unpacked in memory first.
    seekable = stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())
    table = pq.ParquetFile(seekable)
    columns = _check_columns(file, table.schema_arrow.names, report)
    if columns is not None:
        yield from _rows(table.iter_batches(batch_size=1024, columns=columns), columns, file, report)


def _read_arrow(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    """Arrow's file format, and the stream in which `datasets` saves."""
    start = stream.read(6)
    with ExitStack() as stack:
        data = io.BytesIO(start + stream.read()) if not stream.seekable() else stream
        data.seek(0)
        if start == b"ARROW1":
            table = stack.enter_context(pa.ipc.open_file(data))
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            table = stack.enter_context(pa.ipc.open_stream(data))
            batches = iter(table)
        columns = _check_columns(file, table.schema.names, report)
        if columns is not None:
            yield from _rows(batches, columns, file, report)


def _check_columns(file: TextFile, known: list[str], report: SkipReport, hint: str = "") -> list[str] | None:
    """The columns to read; None where the table is no text of the corpus, such as a list of the files beside it.

    `hint` ends the refusal. Where a column that was asked for is not there, `report` learns which are.

    Raises:
        DataError: the table has not all of them, and is meant as text.
    """
    columns, missing = file.fields.columns(known)
    if file.domain_field:
        columns += [file.domain_field] if file.domain_field in known else []
        missing += [] if file.domain_field in known else [file.domain_field]
    problem = None
    if missing:
        fix = "set `data.corpus.text_field` (--text-field) to the one that holds the text, or join several by "
        fix += "`data.corpus.template` (--template)"
        if file.domain_field in missing:
            fix = "set `data.corpus.domain_field` to the one that holds the domain"
        report.lacking.add(dict.fromkeys(known), file.fields.names)
        problem = f"{file.path}: no column {', '.join(sorted(missing))}; it has {shown(known)}: {fix}{hint}"
    return list(dict.fromkeys(columns)) if report.meet_table(str(file.path), problem, file.named) else None


def _rows(
    batches: Iterator[pa.RecordBatch], columns: list[str], file: TextFile, report: SkipReport
) -> Iterator[Document]:
    number = 0
    for batch in batches:
        arrays = {name: batch.column(name) for name in columns}
        for row in range(batch.num_rows):
            number += 1
            where = f"{file.path}:{number}"
            try:
                record = without_added({name: array[row].as_py() for name, array in arrays.items()})
            except UnicodeDecodeError:
                report.skip(where, "not UTF-8")
                continue
            yield from record_document(record, file, number, where, report)


def record_document(
    record: Mapping[str, Any], file: TextFile, number: int, where: str, report: SkipReport
) -> Iterator[Document]:
    """The document in `record`, or a reported skip when its fields do not hold one."""
    try:
        text = file.fields.text_of(record)
    except NoTextError as error:
        if error.absent:
            report.skip_record(where, str(error), record, file.fields.names)
        else:
            report.skip(where, str(error))
        return
    domain = value_at(record, file.domain_field) if file.domain_field else file.domain
    if domain is None or domain is ABSENT:
        report.skip(where, f"field `{file.domain_field}` holds no domain")
    elif not _is_unicode(text):
        report.skip(where, "half a surrogate pair: not Unicode text")
    else:
        yield Document(f"{file.name}:{number}", str(domain), text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
