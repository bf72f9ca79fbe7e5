"""Writing safetensors in parts, in any order, so that a killed process goes on where it was.

The whole plan is known first: headers are written and the files given their full size. Then parts of tensors go to
their places, one journal line each. A second process believes what the journal says was synced, checks what it says
was written after that, and does the rest. At the end everything is read back against the journal.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, final

import torch
from torch import Tensor

from finemoe.checkpoint.storage.layout import Shard, TensorSpec, plan_shards
from finemoe.checkpoint.storage.safetensors import Index, raw_bytes, span
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import sync
from finemoe.core.logs import JsonLines, progress

SHARD_BYTES = 5_000_000_000
"""Largest shard, unless one tensor alone is larger."""

_READ_BYTES = 8 << 20
_SYNC_BYTES = 512 << 20  # written between two syncs; checked again after a kill


@dataclass(frozen=True)
class WrittenFile:
    """A finished file."""

    name: str
    nbytes: int
    sha256: str


@final
class TensorStore:
    """Tensors on their way into `<base>.safetensors`, or shards of it with an index."""

    def __init__(
        self, folder: Path, specs: Sequence[TensorSpec], base: str = "model", *, shard_bytes: int | None = SHARD_BYTES
    ) -> None:
        """Lay out the files in an existing folder, or go on with what an earlier process left there.

        Args:
            folder: to write into; nobody else writes there.
            specs: every tensor, in the order that the shards shall have.
            base: of the file names.
            shard_bytes: largest shard; None: one file.

        Raises:
            RunError: the disk is full or the folder unwritable.
        """
        self._folder = folder
        self._specs = {spec.name: spec for spec in specs}
        if len(self._specs) < len(specs):
            raise ValueError("a tensor is planned twice")
        self._base = base
        self._shards = plan_shards(specs, base, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.offsets}
        self._journal_path = folder / f".{base}.journal"
        self._unsynced = 0
        self._dirty: set[str] = set()
        with writing(folder):
            self._done = self._resume()
            self._taken_over = bool(self._done)
            self._journal = self._new_journal()

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        return sum(shard.size for shard in self._shards)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By tensor name, as planned."""
        return {name: spec.dtype for name, spec in self._specs.items()}

    def facts(self, name: str, index: Index = ()) -> dict[str, Any] | None:
        """What was noted when this part was completed, by this process or one before it; None: it is still to do."""
        record = self._done.get(self._key(name, index))
        return None if record is None else dict(record["facts"])

    def write(self, name: str, tensor: Tensor, index: Index = (), **facts: Any) -> None:
        """Put a whole tensor, or the contiguous part `index` of it, into its place.

        Raises:
            RunError: the disk is full or the folder unwritable.
        """
        with self.part(name, index) as part:
            part.append(tensor)
            part.facts.update(facts)

    @contextlib.contextmanager
    def part(self, name: str, index: Index = ()) -> Iterator[Part]:
        """One part, appended to in pieces; it counts as written when the block ends, and only then.

        Raises:
            RunError: the disk is full or the folder unwritable.
        """
        spec, shard = self._specs[name], self._shard_of[name]
        start, nbytes = self._range(name, index)
        path = self._folder / shard.file
        with writing(path):
            file = os.open(path, os.O_WRONLY)
            try:
                part = Part(file, path, spec, start, nbytes)
                yield part
            finally:
                os.close(file)
        part.check_full()
        record = {"tensor": name, "start": start, "bytes": nbytes, "crc32": part.crc32, "facts": part.facts}
        with writing(self._journal_path):
            self._journal.write(record)
            self._done[(name, start)] = record
            self._dirty.add(shard.file)
            self._unsynced += nbytes
            if self._unsynced >= _SYNC_BYTES:
                self._sync()

    def finish(self, *, quiet: bool = True) -> list[WrittenFile]:
        """Read everything back against the journal, sync, and write the index; the files, as they are now.

        Raises:
            CheckpointError: the disk does not give back what was written, or the journal of an earlier process lies.
            RunError: the disk is full or the folder unwritable.
        """
        by_tensor: dict[str, list[dict[str, Any]]] = {}
        for record in self._done.values():
            by_tensor.setdefault(record["tensor"], []).append(record)
        with writing(self._folder):
            self._sync()
        total = self.nbytes
        with contextlib.ExitStack() as shown:
            advance = None if quiet else shown.enter_context(progress(f"checking {self._base}", total >> 20, "MiB"))
            files = []
            for shard in self._shards:
                files.append(WrittenFile(shard.file, shard.size, self._read_back(shard, by_tensor)))
                if advance is not None:
                    advance(shard.size >> 20)
        if len(self._shards) > 1:
            files.append(self._write_index())
        return files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()  # the workspace removes it once the folder is in its place

    def _range(self, name: str, index: Index) -> tuple[int, int]:
        spec = self._specs[name]
        first, count, _ = span(spec.shape, index)
        size = spec.dtype.itemsize
        return self._shard_of[name].offsets[name] + first * size, count * size

    def _key(self, name: str, index: Index) -> tuple[str, int]:
        return name, self._range(name, index)[0]

    def _resume(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What is done already; none of it, and fresh files, when there is nothing to go on with."""
        records = _read_journal(self._journal_path)
        whole = all(
            (self._folder / shard.file).is_file() and (self._folder / shard.file).stat().st_size == shard.size
            for shard in self._shards
        )
        if not whole or not records or records[0] != self._head():
            self._journal_path.unlink(missing_ok=True)
            for shard in self._shards:
                _allocate(self._folder / shard.file, shard)
            return {}
        synced = max((i for i, record in enumerate(records) if "synced" in record), default=0)
        done = {}
        for i, record in enumerate(records):
            if self._is_part(record) and (i < synced or self._holds(record)):
                done[(record["tensor"], record["start"])] = record
        return done

    def _is_part(self, record: Mapping[str, Any]) -> bool:
        """Whether the line speaks of bytes of a planned tensor; what a damaged one spoke of is done again."""
        spec, start, nbytes = self._specs.get(str(record.get("tensor"))), record.get("start"), record.get("bytes")
        if spec is None or not isinstance(record.get("facts"), dict) or type(record.get("crc32")) is not int:
            return False
        if type(start) is not int or type(nbytes) is not int:
            return False
        at = start - self._shard_of[spec.name].offsets[spec.name]
        whole = at % spec.dtype.itemsize == 0 and nbytes % spec.dtype.itemsize == 0
        return whole and 0 <= at <= at + nbytes <= spec.nbytes

    def _head(self) -> dict[str, Any]:
        plan = hashlib.sha256(b"".join(shard.header for shard in self._shards))
        return {"format": 1, "plan": plan.hexdigest()}

    def _new_journal(self) -> JsonLines:
        """A journal of what is done; an old one may have lines in the middle that a power cut left torn."""
        fresh = self._journal_path.with_name(self._journal_path.name + ".new")
        fresh.unlink(missing_ok=True)
        journal = JsonLines(fresh)
        try:
            for record in (self._head(), *self._done.values()):
                journal.write(record)
            for shard in self._shards if self._done else ():
                sync(self._folder / shard.file)
            journal.write({"synced": True})
            journal.sync()
            fresh.replace(self._journal_path)  # the open file goes along
        except OSError:
            journal.close()
            raise
        return journal

    def _holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the bytes that the journal speaks of are in the file: a power cut may have kept only the journal."""
        with (self._folder / self._shard_of[record["tensor"]].file).open("rb") as file:
            file.seek(record["start"])
            return _crc32(file, record["bytes"], None) == record["crc32"]

    def _sync(self) -> None:
        for file in sorted(self._dirty):
            sync(self._folder / file)
        self._journal.write({"synced": True})
        self._journal.sync()
        self._dirty.clear()
        self._unsynced = 0

    def _read_back(self, shard: Shard, done: Mapping[str, list[dict[str, Any]]]) -> str:
        """SHA-256 of a file whose every byte the journal accounts for."""
        path = self._folder / shard.file
        whole = hashlib.sha256()
        with writing(path), path.open("rb") as file:
            sound = _crc32(file, len(shard.header), whole) == zlib.crc32(shard.header)
            at = len(shard.header)
            for name in shard.offsets:  # in the order of their bytes
                for record in sorted(done.get(name, ()), key=lambda record: record["start"]):
                    if record["start"] != at:
                        raise self._wrong(path, ValueError(f"{name}: a part missing, or written twice, at byte {at}"))
                    sound = _crc32(file, record["bytes"], whole) == record["crc32"] and sound
                    at += record["bytes"]
        if at != shard.size:
            raise self._wrong(path, ValueError(f"{shard.file} has {shard.size - at} bytes that nobody wrote"))
        if not sound:
            said = f"{path}: the disk does not give back what was written to it; check the disk"
            raise self._wrong(path, CheckpointError(said))
        return whole.hexdigest()

    def _wrong(self, path: Path, error: Exception) -> Exception:
        """`error`, unless an earlier process may have written, or a disk since changed, what is at fault."""
        if not self._taken_over:
            return error
        self._journal_path.unlink(missing_ok=True)
        return CheckpointError(
            f"{path}: does not hold what the journal of the interrupted conversion says: one of them is damaged; give "
            "the same command again, which begins anew, and check the disk if that fails too"
        )

    def _write_index(self) -> WrittenFile:
        total = sum(spec.nbytes for spec in self._specs.values())
        table = {name: self._shard_of[name].file for name in sorted(self._specs)}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2, ensure_ascii=False) + "\n"
        path = self._folder / f"{self._base}.safetensors.index.json"
        return write_file(path, text.encode())


@final
class Part:
    """The place of one part of a tensor, filled from its start on."""

    def __init__(self, file: int, path: Path, spec: TensorSpec, start: int, nbytes: int) -> None:
        self._file, self._path, self._spec = file, path, spec
        self._at, self._end = start, start + nbytes
        self.crc32 = 0
        """Of the bytes so far."""
        self.facts: dict[str, Any] = {}
        """JSON-able; kept in the journal with the part."""

    def append(self, tensor: Tensor) -> None:
        """The next elements, in memory order.

        Raises:
            ValueError: another dtype than planned, or more than fits.
        """
        if tensor.dtype != self._spec.dtype:
            raise ValueError(f"{self._spec.name} is planned as {self._spec.dtype}, not {tensor.dtype}")
        data = raw_bytes(tensor)
        if self._at + len(data) > self._end:
            raise ValueError(f"{self._spec.name}: more elements than its part has")
        self.crc32 = zlib.crc32(data, self.crc32)
        while data:
            written = os.pwrite(self._file, data[: 1 << 30], self._at)
            self._at += written
            data = data[written:]

    def check_full(self) -> None:
        """Make sure that no element is missing.

        Raises:
            ValueError: one is.
        """
        if self._at != self._end:
            raise ValueError(f"{self._spec.name}: {self._end - self._at} bytes of a part are missing")


def _crc32(file: BinaryIO, nbytes: int, digest: Any) -> int | None:
    """CRC-32 of the next bytes, which go into `digest` too; None when the file ends before."""
    crc = 0
    while nbytes:
        data = file.read(min(nbytes, _READ_BYTES))
        if not data:
            return None
        crc = zlib.crc32(data, crc)
        if digest is not None:
            digest.update(data)
        nbytes -= len(data)
    return crc


def _allocate(path: Path, shard: Shard) -> None:
    """A file of its full size, so that a full disk shows now and not after hours."""
    with path.open("wb") as file:
        file.write(shard.header)
        file.flush()
        if sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, shard.size)
        file.truncate(shard.size)


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that a kill or a power cut left torn."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(record, dict):
                break
            records.append(record)
    return records


def write_file(path: Path, data: bytes) -> WrittenFile:
    """A small file of a folder that nobody reads yet, synced.

    Raises:
        RunError: the disk is full or the folder unwritable.
    """
    with writing(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, len(data), hashlib.sha256(data).hexdigest())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals into plain words.

    Raises:
        RunError: the disk is full or `path` unwritable.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{path}: the disk is full; free some space and give the same command again") from error
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
