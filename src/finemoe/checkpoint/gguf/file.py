"""GGUF files by their headers: what is in them and where, believed only after it accounts for the whole file.

The header is read with bounds on everything that it may announce, and tensors are copied row by row instead of mapped:
a file that is damaged, hostile or cut short meanwhile is an error message.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from torch import Tensor

from finemoe.checkpoint.gguf.codec import ElementType, decode, element_types
from finemoe.core.contents import explanation
from finemoe.core.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 16  # metadata; real files have fewer than a hundred
_MAX_TENSORS = 1 << 18
_MAX_ELEMENTS = 1 << 24  # of all arrays together; a tokenizer has less than a million
_MAX_NAME = 1 << 10
_MAX_TEXT = 64 << 20  # one string, such as a chat template
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, from the header alone."""

    name: str
    kind: ElementType
    shape: tuple[int, ...]
    """Slowest dimension first, as PyTorch has it; the file lists them the other way round."""
    path: Path
    offset: int
    """Of the first byte, in the file."""

    @property
    def rows(self) -> int:
        """All dimensions but the last, multiplied."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.rows * self.kind.row_bytes(self.shape[-1])

    def raw(self, first: int, rows: int) -> bytearray:
        """Rows of the tensor seen as `[rows, last dimension]`, as they are in the file.

        Raises:
            CheckpointError: the file cannot be read to the tensor's end.
        """
        width = self.kind.row_bytes(self.shape[-1])
        data = bytearray(rows * width)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + first * width)
                _fill(file, data, f"{self.path}: ends within tensor {self.name!r}; it was cut short")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return data

    def read(self) -> Tensor:
        """All its elements, in `kind.dtype`.

        Raises:
            CheckpointError: as `raw`.
        """
        return decode(self.raw(0, self.rows), self.kind, self.shape[-1]).view(self.shape)


def _fill(file: BinaryIO, data: bytearray, torn: str) -> None:
    view = memoryview(data)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(torn)
        view = view[got:]


@final
@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors, of all shards together."""

    path: Path
    metadata: Mapping[str, Any]
    """Whole numbers, fractions, texts, truth values, and lists of one of them. A float32 is the shortest decimal."""
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]


def read_header(path: Path, *, whole: bool = True) -> GGUFFile:
    """Open a file, and the other shards where it is the first of several.

    Args:
        path: of the file.
        whole: the tensors must follow; else the header is enough, as where a download was stopped after it.

    Raises:
        CheckpointError: unreadable, damaged, or not the first shard.
        ConfigError: the `gguf` package is not installed.
    """
    kinds = element_types()
    first = _Header(path, kinds, whole).read()
    count, number = (first.metadata.get(f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
    if type(count) is not int or type(number) is not int or not 0 <= number < max(1, count) or count > _MAX_ENTRIES:
        raise CheckpointError(f"{path}: split.no {number!r} of split.count {count!r} is no shard")
    if count <= 1:
        return first
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match[2]) != number + 1 or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is shard {number + 1} of {count}, so its name must end so; keep the name it had"
        )
    if number:
        raise CheckpointError(f"{path}: is shard {number + 1} of {count}; give the first, {match[1]}-00001-of-...")
    tensors, files = dict(first.tensors), [path]
    for at in range(2, count + 1):
        shard = _Header(path.with_name(f"{match[1]}-{at:05d}-of-{count:05d}.gguf"), kinds, whole).read()
        twice = next((name for name in shard.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(f"{shard.path}: tensor {twice!r} is in another shard too")
        tensors.update(shard.tensors)
        files.append(shard.path)
    total = first.metadata.get("split.tensors.count")
    if total != len(tensors):
        raise CheckpointError(f"{path}: the shards hold {len(tensors)} tensors, but split.tensors.count is {total!r}")
    return GGUFFile(path, first.metadata, tensors, tuple(files))


@final
class _Header:
    """One pass over a header."""

    def __init__(self, path: Path, kinds: Mapping[int, ElementType], whole: bool) -> None:
        self._path, self._kinds, self._whole = path, kinds, whole
        self._at = self._size = self._elements = 0

    def read(self) -> GGUFFile:
        try:
            found = self._path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{self._path}: not a regular file")
            self._size = found.st_size
            with self._path.open("rb") as file:
                self._file = file
                return self._parse()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._path}: no such file") from error
        except (OSError, ValueError) as error:  # ValueError: text that is not UTF-8, or a name no file can have
            reason = error.strerror if isinstance(error, OSError) else None
            raise CheckpointError(f"{self._path}: cannot be read: {reason or error}") from error

    def _parse(self) -> GGUFFile:
        if self._take(4) != _MAGIC:
            held = explanation(self._path, frozenset({"gguf"}))
            more = f"; it {held}" if held else ""
            raise CheckpointError(f"{self._path}: not a GGUF file: it does not begin with GGUF{more}")
        version = self._number("<I")
        if version not in _VERSIONS:
            big = "; it seems to be big-endian" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self._path}: GGUF version {version}{big}; versions 2 and 3 are read")
        num_tensors = self._count(_MAX_TENSORS, 32, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(_MAX_ENTRIES, 13, "metadata entries")):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise CheckpointError(f"{self._path}: the metadata has {key!r} twice")
            metadata[key] = self._value(self._number("<I"), key)
        infos = [self._info() for _ in range(num_tensors)]
        return GGUFFile(self._path, metadata, self._placed(infos, _alignment(metadata, self._path)), (self._path,))

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise CheckpointError(f"{self._path}: truncated, or not GGUF: the file ends within its header")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self._path}: ends while it is read")
        self._at += count
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, most: int, least_bytes: int, what: str) -> int:
        """A number of things, each of at least so many bytes."""
        count: int = self._number("<Q")
        if count > most:
            raise CheckpointError(f"{self._path}: the header says it has {count} {what}; at most {most} are read")
        if count * least_bytes > self._size - self._at:
            raise CheckpointError(f"{self._path}: truncated: no room for {count} {what}")
        return count

    def _string(self, most: int) -> str:
        return self._take(self._count(most, 1, "bytes in a text")).decode("utf-8")

    def _strings(self, count: int) -> list[str]:
        """As `_string`, so many times: a vocabulary has hundreds of thousands, and takes longest."""
        read, left, found = self._file.read, self._size - self._at, []
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            left -= 8 + length
            if left < 0 or length > _MAX_TEXT:
                raise CheckpointError(f"{self._path}: truncated, or not GGUF: the file ends within its header")
            found.append(read(length).decode("utf-8"))
        self._at = self._size - left
        if self._file.tell() != self._at:
            raise CheckpointError(f"{self._path}: ends while it is read")
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(_MAX_TEXT)
        if kind in _SCALARS:
            form = _SCALARS[kind]
            return self._values(kind, self._take(struct.calcsize(form)), key)[0]
        if kind != _ARRAY:
            raise CheckpointError(f"{self._path}: {key} has value type {kind}, which GGUF does not know")
        inner = self._number("<I")
        if inner != _STRING and inner not in _SCALARS:
            raise CheckpointError(f"{self._path}: {key} is a list of value type {inner}, which is not read")
        size = 8 if inner == _STRING else struct.calcsize(_SCALARS[inner])
        count = self._count(_MAX_ELEMENTS - self._elements, size, f"elements in {key}")
        self._elements += count
        if inner == _STRING:
            return self._strings(count)
        return self._values(inner, self._take(count * size), key)

    def _values(self, kind: int, data: bytes, key: str) -> list[Any]:
        values = np.frombuffer(data, np.dtype(_SCALARS[kind]))
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._path}: {key} holds a number that is not finite")
        if kind == _BOOL:
            if (values > 1).any():
                raise CheckpointError(f"{self._path}: {key} holds a truth value that is neither 0 nor 1")
            return [bool(value) for value in values]
        if kind == _FLOAT32:
            return [float(str(value)) for value in values]  # 1e-05, not 9.999999747378752e-06
        found: list[Any] = values.tolist()
        return found

    def _info(self) -> tuple[str, ElementType, tuple[int, ...], int]:
        name = self._string(_MAX_NAME)
        where = f"{self._path}: tensor {name!r}"
        dimensions = self._number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(f"{where}: has {dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))))
        number, offset = self._number("<I"), self._number("<Q")
        if min(shape) < 1 or math.prod(shape) >= 1 << 60:
            raise CheckpointError(f"{where}: shape {list(shape)} is not possible")
        kind = self._kinds.get(number)
        if kind is None:
            raise CheckpointError(f"{where}: element type {number} is unknown")
        if not kind.readable:
            raise CheckpointError(f"{where}: element type {kind.name} is not read")
        if shape[-1] % kind.block:
            raise CheckpointError(f"{where}: rows of {shape[-1]} are no whole blocks of {kind.name}, {kind.block} each")
        return name, kind, shape, offset

    def _placed(
        self, infos: list[tuple[str, ElementType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, StoredTensor]:
        """The tensors by name, after they account for every byte that follows the header."""
        at = begin = _padded(self._at, alignment) if infos else self._at
        placed: dict[str, StoredTensor] = {}
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            tensor = StoredTensor(name, kind, shape, self._path, begin + offset)
            if name in placed:
                raise CheckpointError(f"{self._path}: tensor {name!r} is in it twice")
            if tensor.offset != _padded(at, alignment):
                raise CheckpointError(f"{self._path}: tensor {name!r} leaves a gap or overlaps the one before it")
            placed[name] = tensor
            at = tensor.offset + tensor.nbytes
        if at > self._size and self._whole:
            raise CheckpointError(f"{self._path}: truncated: {self._size} bytes, but header and tensors are {at}")
        if _padded(at, alignment) < self._size:
            raise CheckpointError(
                f"{self._path}: has more bytes than its header says: {self._size}, but header and tensors are {at}"
            )
        return placed


def _padded(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(f"{path}: general.alignment is {value!r}, but must be a power of two")
    return value
