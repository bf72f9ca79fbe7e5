"""Safetensors written in one pass: each piece goes to the disk and into the checksum together.

Nothing here holds Python's global lock for long: a thread that writes leaves the thread that trains alone.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from finemoe.checkpoint.storage.layout import TensorSpec, lay_out
from finemoe.checkpoint.storage.safetensors import raw_bytes

_PIECE_BYTES = 4 << 20
_SYNC_BYTES = 256 << 20  # unsynced at most: dirty pages beyond what the system allows would stop every writer here


class AbandonedError(Exception):
    """Somebody asked for the writing to stop. It never leaves the process."""


@dataclass(frozen=True)
class Recorded:
    """What a file must be."""

    nbytes: int
    sha256: str


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    stop: threading.Event | None = None,
    metadata: Mapping[str, str] | None = None,
    mode: Literal["wb", "xb"] = "wb",
) -> Recorded:
    """Write tensors of any device as one safetensors file, synced; `metadata` goes into its header.

    Raises:
        AbandonedError: `stop` was set.
        OSError: the system refuses, or with `mode` "xb" the file is there already.
    """
    specs = [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    shard = lay_out(path.name, specs, metadata)
    return _write(path, _bytes_of(shard.header, (tensors[name] for name in shard.offsets)), stop, mode)


def write_bytes(path: Path, data: bytes) -> Recorded:
    """Write a small file, synced.

    Raises:
        OSError: the system refuses.
    """
    return _write(path, [memoryview(data)], None, "wb")


def _bytes_of(header: bytes, tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:  # one at a time: what lies on another device is never here as a whole
        data = raw_bytes(tensor.cpu())
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]


def _write(
    path: Path, pieces: Iterable[memoryview], stop: threading.Event | None, mode: Literal["wb", "xb"]
) -> Recorded:
    digest, nbytes, synced = hashlib.sha256(), 0, 0
    with path.open(mode) as file:
        for piece in pieces:
            if stop is not None and stop.is_set():
                raise AbandonedError
            file.write(piece)
            digest.update(piece)
            nbytes += len(piece)
            if nbytes - synced >= _SYNC_BYTES:
                os.fsync(file.fileno())
                synced = nbytes
        file.flush()
        os.fsync(file.fileno())
    return Recorded(nbytes, digest.hexdigest())
