"""From the bytes of a file to its content in UTF-8: unpacked and decoded on the way, whatever its name says."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import zstandard

from finemoe.core.contents import HEAD_BYTES, PACKED, WRITTEN, Contents, contents_of
from finemoe.core.encodings import likely_encoding, mark_of

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, pa.ArrowException)
"""What readers of damaged files raise."""
PACKED_SUFFIXES = frozenset({".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd"})
"""Suffixes that say nothing but how a file is packed."""
_CHUNK = 1 << 18
_MOST_LAYERS = 3


class UndecodableError(Exception):
    """A file whose text is not in the encoding it should be in: where, and what it may be in instead."""

    def __init__(self, encoding: str, position: int, error: UnicodeDecodeError) -> None:
        begin = max(0, error.start - 1000) & ~3
        likely = likely_encoding(error.object[begin : begin + 20_000])
        guess = f'it looks like {likely}, so set `data.corpus.encoding = "{likely}"` (--encoding)' if likely else (
            "set `data.corpus.encoding` (--encoding) to what it is in, or save it as UTF-8"
        )  # fmt: skip
        name = "UTF-8" if encoding == "utf-8" else encoding
        super().__init__(f"not {name} (byte {position}): {guess}")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a zstd file. Unlike the library's reader it notices a file that breaks off."""

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
            chunk = chunk or self._file.read(_CHUNK)
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


class _Recoded(io.RawIOBase):
    """Text in another encoding, as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str, skipped: int) -> None:
        self._file, self._encoding, self._position = file, encoding, skipped
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = b"-"
        while not self._ready and chunk:
            chunk = self._file.read(_CHUNK)
            try:
                text = self._decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The decoder puts what the last chunk left over before this one.
                held = len(error.object) - len(chunk)
                place = self._position - held + error.start
                raise UndecodableError(self._encoding, place, error) from error
            self._position += len(chunk)
            self._ready = memoryview(text.encode())
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _zstd(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_ZstdReader(file), _CHUNK))


_UNPACKERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "gzip": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb")),
    "bzip2": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    "xz": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115 - whoever reads closes it
    "zstd": _zstd,
}


def checked(stream: BinaryIO) -> BinaryIO:
    """A stream of UTF-8 that raises UndecodableError, with the place, where it is none."""
    return cast(BinaryIO, io.BufferedReader(_Recoded(stream, "utf-8", 0), _CHUNK))


@contextmanager
def open_content(path: Path, encoding: str = "utf-8") -> Iterator[tuple[BinaryIO, Contents]]:
    """What a file holds once unpacked, and what that is. Text is given as UTF-8 without a byte order mark.

    Args:
        path: the file.
        encoding: that of text which has no byte order mark to tell.

    Raises:
        OSError: it cannot be read. While the stream is read, one of DAMAGED, or UndecodableError.
    """
    layers: list[str] = []
    while True:
        with ExitStack() as stack:
            stream = _unpacked(path, layers, stack)
            head = _head(stream)
            found = contents_of(head, encoding)
            if found.kind in PACKED and len(layers) < _MOST_LAYERS:
                layers.append(found.kind)
                continue
        break
    with ExitStack() as stack:
        stream = _unpacked(path, layers, stack)
        name, length = (mark_of(head) if found.encoding else None) or (encoding, 0)
        if found.kind in WRITTEN:
            stream.read(length)
            if name != "utf-8":
                stream = cast(BinaryIO, io.BufferedReader(_Recoded(stream, name, length), _CHUNK))
        yield stream, found


def _unpacked(path: Path, layers: list[str], stack: ExitStack) -> BinaryIO:
    stream: BinaryIO = stack.enter_context(path.open("rb"))
    for layer in layers:
        stream = stack.enter_context(_UNPACKERS[layer](stream))
    return stream


def _head(stream: BinaryIO) -> bytes:
    """The first bytes; what can be read of them where the file breaks off."""
    head = b""
    try:
        while len(head) < HEAD_BYTES and (piece := stream.read1(HEAD_BYTES - len(head))):  # type: ignore[attr-defined]
            head += piece
    except DAMAGED:  # whoever reads on meets it again
        pass
    return head
