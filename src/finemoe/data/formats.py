"""Files to documents: plain text, JSON Lines and Parquet, each as it is or compressed, chosen by suffix.

Everything is read as bytes and decoded as strict UTF-8: line ends stay what they are, and only a line feed
ends a JSON line. What cannot be read is reported and left out; what was read before a file broke off is kept.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from finemoe.core.errors import DataError
from finemoe.data.documents import Document, SkipReport

_ZSTD_CHUNK = 1 << 18
_DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, pa.ArrowException)


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. Unlike the library's reader it notices a file that breaks off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._within_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame.eof else b""
            chunk = chunk or self._file.read(_ZSTD_CHUNK)
            if not chunk:
                if self._within_frame:
                    raise EOFError("the compressed file ends too early")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._within_frame = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_gzip(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb"))


def _open_xz(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path, "rb"))


def _open_zstd(path: Path) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_ZstdReader(open(path, "rb")), _ZSTD_CHUNK))


COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {".gz": _open_gzip, ".xz": _open_xz, ".zst": _open_zstd}


@dataclass(frozen=True)
class TextFile:
    """A file to read: where it is, its stable name, its texts' domain, and the fields to read of records."""

    path: Path
    name: str
    domain: str
    text_field: str
    domain_field: str | None


def read_file(file: TextFile, report: SkipReport) -> Iterator[Document]:
    """The documents of `file`: one for a text file, one a record for JSON Lines and Parquet."""
    suffixes = [suffix.lower() for suffix in file.path.suffixes]
    opener = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[:-1] if opener else suffixes
    read = FORMATS.get(inner[-1], _read_text) if inner else _read_text
    try:
        with opener(file.path) if opener else open(file.path, "rb") as stream:
            yield from read(stream, file, report)
    except _DAMAGED as error:
        report.skip(str(file.path), f"damaged or unreadable: {error}")


def _read_text(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    try:
        text = stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        report.skip(str(file.path), f"not UTF-8 (byte {error.start})")
        return
    yield Document(file.name, file.domain, text)


def _read_json_lines(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            report.skip(where, f"not a JSON line: {error}")
            continue
        if isinstance(record, dict):
            yield from record_document(record, file, number, where, report)
        else:
            report.skip(where, f"not a JSON object but {type(record).__name__}")


def _read_parquet(stream: BinaryIO, file: TextFile, report: SkipReport) -> Iterator[Document]:
    # Parquet is read from its end: a compressed one has to be unpacked in memory first.
    seekable = stream if isinstance(stream, io.BufferedReader) and stream.seekable() else io.BytesIO(stream.read())
    table = pq.ParquetFile(seekable)
    columns = [file.text_field, *([file.domain_field] if file.domain_field else [])]
    missing = set(columns) - set(table.schema_arrow.names)
    if missing:
        known = ", ".join(table.schema_arrow.names)
        raise DataError(
            f"{file.path}: no column {', '.join(sorted(missing))}: set `text_field` or `domain_field` to one of {known}"
        )
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        arrays = {name: batch.column(name) for name in columns}
        for row in range(batch.num_rows):
            number += 1
            where = f"{file.path}:{number}"
            try:
                record = {name: array[row].as_py() for name, array in arrays.items()}
            except UnicodeDecodeError:
                report.skip(where, "not UTF-8")
                continue
            yield from record_document(record, file, number, where, report)


FORMATS: dict[str, Callable[[BinaryIO, TextFile, SkipReport], Iterator[Document]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


def record_document(
    record: dict[str, Any], file: TextFile, number: int, where: str, report: SkipReport
) -> Iterator[Document]:
    """The document in `record`, or a reported skip when its fields do not hold one."""
    text = record.get(file.text_field)
    domain = record.get(file.domain_field) if file.domain_field else file.domain
    if not isinstance(text, str):
        report.skip(where, f"field `{file.text_field}` holds no text")
    elif domain is None:
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
