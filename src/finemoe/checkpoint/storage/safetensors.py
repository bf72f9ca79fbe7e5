"""Safetensors read by their headers: nothing is loaded until it is asked for, and never more than that.

A header is believed only after it accounts for every byte of its file. Reading copies from the file instead of mapping
it, so that a file cut short meanwhile is an error message and not the end of the process.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from finemoe.checkpoint.storage.untrusted import parse_json, weight_files
from finemoe.core.contents import explanation
from finemoe.core.errors import CheckpointError, RunError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Safetensors' names of element types."""
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
HEADER_BYTES = 100 * 1000 * 1000
"""Largest header that is read; the safetensors library has the same limit."""
CHUNK_BYTES = 64 << 20
"""How much of a tensor is in memory at once where it is worked on in pieces."""

_MAX_RANK = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, from the header alone."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of the first byte, in the file."""
    nbytes: int
    pieces: tuple[TensorInfo, ...] = ()
    """Each with some of its rows, in order, where it lies in several; path and offset are then those of the first."""


Index = Sequence[int | slice]


def span(shape: tuple[int, ...], index: Index) -> tuple[int, int, tuple[int, ...]]:
    """Where `tensor[index]` lies in a tensor of `shape`: first element, number of elements, shape of the part.

    Raises:
        ValueError: the part is not one contiguous range within the tensor.
    """
    rest, start = list(shape), 0
    for position, at in enumerate(index):
        if not rest:
            raise ValueError(f"index {tuple(index)} has more places than shape {list(shape)}")
        size, inner = rest[0], math.prod(rest[1:])
        if isinstance(at, slice):
            first, stop, step = at.indices(size)
            whole = position == len(index) - 1 and step == 1 and first <= stop
            if not whole or (at.stop is not None and at.stop > size):
                raise ValueError(f"index {tuple(index)} is no contiguous part of shape {list(shape)}")
            return start + first * inner, (stop - first) * inner, (stop - first, *rest[1:])
        if not 0 <= at < size:
            raise ValueError(f"index {tuple(index)} is outside shape {list(shape)}")
        start += at * inner
        rest = rest[1:]
    return start, math.prod(rest), tuple(rest)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their bytes, and its metadata.

    Raises:
        CheckpointError: truncated, or a header that does not describe the file exactly.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 8 or length > found.st_size - 8:
                raise CheckpointError(_refusal(path, "the file ends within its header"))
            if length > HEADER_BYTES:
                long = f"the header says it has {length} bytes; at most {HEADER_BYTES} are read"
                raise CheckpointError(_refusal(path, long))
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    table = parse_json(header, f"{path}: header")
    metadata = _metadata(table.pop(_METADATA, {}), path)
    infos = [_info(name, entry, path, 8 + length) for name, entry in table.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    at = 8 + length
    for info in infos:
        if info.offset != at:
            raise CheckpointError(f"{path}: tensor {info.name!r} leaves a gap or overlaps the one before it")
        at += info.nbytes
    if at != found.st_size:
        state = "truncated" if at > found.st_size else "has more bytes than its header says"
        raise CheckpointError(f"{path}: {state}: {found.st_size} bytes, but header and tensors are {at}")
    return {info.name: info for info in infos}, metadata


def _refusal(path: Path, problem: str) -> str:
    held = explanation(path, frozenset({"safetensors"}))
    return f"{path}: not safetensors: it {held}" if held else f"{path}: truncated, or not safetensors: {problem}"


def _metadata(raw: Any, path: Path) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise CheckpointError(f"{path}: {_METADATA} of the header must be a table of strings")
    return raw


def _info(name: str, entry: Any, path: Path, data: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give exactly its dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {entry['dtype']!r} is unknown; known: {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_RANK or math.prod(max(1, size) for size in shape) >= 1 << 60:
        raise CheckpointError(f"{where}: shape {str(shape)[:100]} is not possible")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:100]} are not a range of bytes")
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where}: {entry['dtype']} of shape {shape} takes {nbytes} bytes, not {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data + offsets[0], nbytes)


def _counts(values: Any) -> bool:
    """A list of whole numbers from 0 on; true and false are none."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


@final
class TensorFolder:
    """The tensors of one or more safetensors files by name, opened by their headers."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        notes: Sequence[str] = (),
        warnings: Sequence[str] = (),
        unlisted: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        """In the order of files and bytes."""
        self.notes = tuple(notes)
        """What lies in the folder and is not read."""
        self.warnings = tuple(warnings)
        """Where files and index disagree, and which of them counts."""
        self.unlisted = dict(unlisted or {})
        """What the files hold and the index does not name."""

    @staticmethod
    def open(folder: Path) -> TensorFolder:
        """The weights of a folder: `model.safetensors`, or shards with their index.

        The index says which of several files that hold a tensor counts, as where an overlay lies over older shards.

        Raises:
            CheckpointError: as `weight_files` and `read_header`, or the index names a tensor that is not there.
        """
        weights = weight_files(folder)
        if weights.index is None:
            return TensorFolder(TensorFolder.of_files(weights.files).tensors, weights.notes)
        tensors, unlisted, warnings = _by_index(folder, weights.index, weights.files)
        return TensorFolder(tensors, weights.notes, (*weights.warnings, *warnings), unlisted)

    def listed(self, names: Collection[str]) -> TensorFolder:
        """With those of `unlisted` that are among `names`, and a warning that says so."""
        found = {name: info for name, info in self.unlisted.items() if name in names}
        if not found:
            return self
        left = {name: info for name, info in self.unlisted.items() if name not in found}
        warning = _said(list(found), "missing in the index, and read from where it is all the same")
        return TensorFolder({**self.tensors, **found}, self.notes, (*self.warnings, warning), left)

    @staticmethod
    def of_files(files: Sequence[Path]) -> TensorFolder:
        """The tensors of these files together.

        Raises:
            CheckpointError: as `read_header`, or a name in two files.
        """
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path)[0].items():
                if name in tensors:
                    raise CheckpointError(f"{path}: tensor {name!r} is in {tensors[name].path.name} too")
                tensors[name] = info
        return TensorFolder(tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in reading order."""
        return tuple(dict.fromkeys(one.path for info in self.tensors.values() for one in info.pieces or (info,)))

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def headers(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """Name, element type, shape and place of every tensor: JSON-able, and other for any other folder."""
        return [(info.name, str(info.dtype), info.shape, info.offset) for info in self.tensors.values()]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor, or the contiguous part `tensor[index]` of it: a copy in memory of its own.

        Raises:
            CheckpointError: no such tensor, or the file cannot be read to the tensor's end.
        """
        info = self.info(name)
        first, count, shape = span(info.shape, index)
        raw = torch.empty(count * info.dtype.itemsize, dtype=torch.uint8)
        _fill(raw, info, first * info.dtype.itemsize)
        return raw.view(info.dtype).reshape(shape)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"there is no tensor {name!r} in the weights") from None

    def chunks(
        self, name: str, index: Index = (), *, max_bytes: int = CHUNK_BYTES, multiple: int = 1
    ) -> Iterator[Tensor]:
        """`read(name, index)` in consecutive slices of its first dimension, each of about `max_bytes`.

        Args:
            name: of the tensor.
            index: of the part.
            max_bytes: of one slice; a slice has `multiple` rows at the least.
            multiple: every slice but the last has a multiple of this number of rows.

        Raises:
            CheckpointError: as `read`.
        """
        info = self.info(name)
        shape = span(info.shape, index)[2]
        if not shape or math.prod(shape) * info.dtype.itemsize <= max_bytes:
            yield self.read(name, index)
            return
        leading, offset = list(index), 0
        if leading and isinstance(leading[-1], slice):
            offset = leading.pop().start or 0  # type: ignore[union-attr]
        row = math.prod(shape[1:]) * info.dtype.itemsize
        rows = max(1, max_bytes // max(1, row * multiple)) * multiple
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            yield self.read(name, [*leading, slice(offset + start, offset + stop)])

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, whatever their types; read in pieces, up to the first difference.

        Raises:
            CheckpointError: as `read`.
        """
        if self.info(one).shape != self.info(other).shape:
            return False
        width = max(1, *(self.info(name).nbytes // max(1, self.info(name).shape[0]) for name in (one, other)))
        rows = max(1, CHUNK_BYTES // width)
        for start in range(0, self.info(one).shape[0], rows):
            part = (slice(start, min(start + rows, self.info(one).shape[0])),)
            if not torch.equal(self.read(one, part).double(), self.read(other, part).double()):
                return False
        return True

    def sha256(self, name: str) -> str:
        """Hex digest of a tensor's bytes, read in pieces.

        Raises:
            CheckpointError: as `read`.
        """
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(raw_bytes(chunk))
        return digest.hexdigest()


def _fill(raw: Tensor, info: TensorInfo, skip: int) -> None:
    view = raw.numpy().data
    for one in info.pieces or (info,):
        here = view[: max(0, one.nbytes - skip)]
        if here:  # of many pieces, few are asked for
            _copy(here, one, skip)
        view, skip = view[len(here) :], max(0, skip - one.nbytes)


def _copy(view: memoryview, info: TensorInfo, skip: int) -> None:
    try:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.offset + skip)
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{info.path}: ends within tensor {info.name!r}; it was cut short")
                view = view[got:]
    except FileNotFoundError as error:
        raise CheckpointError(f"{info.path}: has gone since it was opened") from error
    except OSError as error:
        # Not a refusal of the checkpoint: a disk or network that fails now may work later, and what is done is kept.
        raise RunError(f"{info.path}: cannot be read now: {error.strerror or error}; try again") from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a file holds them; no copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _by_index(
    folder: Path, index: Mapping[str, str], files: Sequence[Path]
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo], list[str]]:
    """What the index names, from the file that it names; what else the files hold once; and warnings."""
    holders: dict[str, list[TensorInfo]] = {}
    for path in files:
        for name, info in read_header(path)[0].items():
            holders.setdefault(name, []).append(info)
    tensors: dict[str, TensorInfo] = {}
    astray, covered = [], []
    for name, held in holders.items():
        if name not in index:
            continue
        named = [info for info in held if info.path.name == index[name]]
        if not named and len(held) > 1:
            raise CheckpointError(
                f"{folder}: the index says that {index[name]} holds tensor {name!r}, but it does not, and "
                f"{' and '.join(info.path.name for info in held)} do"
            )
        astray += [name] * (not named)
        covered += [name] * (len(held) > 1)
        tensors[name] = (named or held)[0]
    absent = [name for name in index if name not in holders]  # a model that needs one says so itself
    unlisted = {name: held[0] for name, held in holders.items() if name not in index and len(held) == 1}
    twice = [name for name, held in holders.items() if name not in index and len(held) > 1]
    warnings = [
        _said(names, what)
        for names, what in (
            (covered, "in several files, and the one that the index names counts"),
            (astray, "not in the file that the index names, and read from the one that holds it"),
            (twice, "in several files and not in the index, and not used"),
            (absent, "in the index, and in no file"),
        )
        if names
    ]
    return _in_order(tensors, files), unlisted, warnings


def _in_order(tensors: Mapping[str, TensorInfo], files: Sequence[Path]) -> dict[str, TensorInfo]:
    rank = {path: at for at, path in enumerate(files)}
    return dict(sorted(tensors.items(), key=lambda item: (rank[item[1].path], item[1].offset, item[1].nbytes)))


def _said(names: Sequence[str], what: str) -> str:
    few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{'1 tensor is' if len(names) == 1 else f'{len(names)} tensors are'} {what}: {few}"
