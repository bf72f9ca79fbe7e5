"""Which tensor lies where in which file, decided before a byte of them is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its header, and where in the file each of its tensors begins."""

    file: str
    """Its name."""
    header: bytes
    """With its length before it."""
    offsets: Mapping[str, int]
    """Tensor -> first byte in the file, in that order."""
    size: int
    """Of the file in bytes."""


def plan_shards(specs: Sequence[TensorSpec], base: str, shard_bytes: int | None) -> list[Shard]:
    """Cut `specs` into files of at most `shard_bytes`, or one when None; a larger tensor has a file of its own."""
    groups: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not groups or (shard_bytes is not None and filled + spec.nbytes > shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [lay_out(f"{base}.safetensors", groups[0])]
    return [lay_out(f"{base}-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def lay_out(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> Shard:
    """All of `specs` in one file; `metadata` says what else its header does."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets, at = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):  # wide elements first, so that all are aligned
        offsets[spec.name] = at
        table[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + at)
