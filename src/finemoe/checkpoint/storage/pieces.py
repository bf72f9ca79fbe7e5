"""Tensors of which each of several files holds some rows.

The files are those of torch.distributed.checkpoint's `HuggingFaceStorageWriter`: safetensors whose headers say, under
`DCP_SHARDING_INFO`, where in its whole each tensor begins. The shape of the whole is ours; torch does not read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.checkpoint.storage.safetensors import TensorFolder, TensorInfo, read_header
from finemoe.checkpoint.storage.untrusted import parse_json
from finemoe.core.errors import CheckpointError

_PIECES, _OFFSETS, _WHOLE = "DCP_SHARDING_INFO", "saved_offsets", "whole_shape"


@dataclass(frozen=True)
class Place:
    """Where a piece lies in its whole tensor."""

    first: int
    """Row that it begins with; 0 where there are none."""
    whole: tuple[int, ...]
    """Shape of the whole tensor."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of its first element, in every dimension."""
        return (self.first, *(0 for _ in self.whole[1:])) if self.whole else ()


def said_of(places: Mapping[str, Place]) -> dict[str, str]:
    """What the header of a file with these pieces says of them."""
    table = {name: {_OFFSETS: list(place.offsets), _WHOLE: list(place.whole)} for name, place in places.items()}
    return {_PIECES: json.dumps(table)}


def open_pieces(files: Sequence[Path]) -> TensorFolder:
    """The whole tensors of which these files hold pieces, read when asked for.

    Raises:
        CheckpointError: as `read_header`, a header that does not say where its pieces lie, or pieces that do not make
            up a whole.
    """
    found: dict[str, list[tuple[Place, TensorInfo]]] = {}
    for path in files:
        tensors, metadata = read_header(path)
        table = parse_json(metadata.get(_PIECES, "{}").encode(), f"{path}: {_PIECES} of the header")
        for name, info in tensors.items():
            found.setdefault(name, []).append((_place(table.get(name), info), info))
    return TensorFolder({name: _whole(name, pieces) for name, pieces in found.items()})


def _place(entry: Any, info: TensorInfo) -> Place:
    """What the header says of a piece.

    Raises:
        CheckpointError: nothing, or what cannot be.
    """
    table = entry if isinstance(entry, dict) else {}
    offsets, whole = (_numbers(table.get(key), len(info.shape)) for key in (_OFFSETS, _WHOLE))
    if offsets is not None and whole is not None:
        place = Place(offsets[0] if offsets else 0, whole)
        if offsets == place.offsets and info.shape[1:] == whole[1:]:
            return place
    raise CheckpointError(f"{info.path}: the header does not say which rows of tensor {info.name!r} the file holds")


def _numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """So many whole numbers; true and false are none."""
    fits = isinstance(value, list) and len(value) == count and all(type(one) is int for one in value)
    return tuple(value) if fits else None


def _whole(name: str, pieces: Sequence[tuple[Place, TensorInfo]]) -> TensorInfo:
    """A tensor of its pieces.

    Raises:
        CheckpointError: rows are missing or twice there.
    """
    pieces = sorted(pieces, key=lambda one: (one[0].first, one[1].nbytes))
    (first, info), at = pieces[0], 0
    for place, one in pieces:
        if place.whole != first.whole or one.dtype != info.dtype or (place.first != at and one.nbytes):
            raise CheckpointError(f"{one.path}: its rows of tensor {name!r} do not continue those of the other files")
        at += one.shape[0] if one.shape else 0
    if first.whole and at != first.whole[0]:
        raise CheckpointError(
            f"{pieces[-1][1].path.parent}: of tensor {name!r} there are {at} rows and not {first.whole[0]}: a file is "
            "missing"
        )
    if len(pieces) == 1:
        return info
    nbytes = math.prod(first.whole) * info.dtype.itemsize
    return TensorInfo(name, info.dtype, first.whole, info.path, info.offset, nbytes, tuple(one for _, one in pieces))
