"""Named arrays in a folder, with the hash of all of them: mapped into memory, and known when they are damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from finemoe.data.cache import DamagedError

_SUM = "sha256.txt"
_ROWS = 1 << 16  # hashed at once: a file may be larger than memory


def seal(folder: Path, kinds: Mapping[str, DTypeLike], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write the arrays that are not in `folder` yet, as NAME.npy, and the hash of all that `kinds` names."""
    for name, array in arrays.items():
        if not (folder / f"{name}.npy").exists():
            np.save(folder / f"{name}.npy", array)
    (folder / _SUM).write_text(_sum(kinds, arrays), encoding="utf-8")


def open_sealed(folder: Path, kinds: Mapping[str, DTypeLike]) -> dict[str, NDArray[Any]]:
    """What `seal` wrote, by name.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in kinds}
        recorded = (folder / _SUM).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder}: {error}") from error
    if _sum(kinds, arrays) != recorded:
        raise DamagedError(f"{folder}: its arrays do not have their recorded hash")
    return arrays


def _sum(kinds: Mapping[str, DTypeLike], arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, kind in kinds.items():
        array = arrays[name]
        digest.update(f"{name} {array.shape} {array.dtype == kind}".encode())
        for start in range(0, len(array), _ROWS):
            digest.update(np.ascontiguousarray(array[start : start + _ROWS]).tobytes())
    return digest.hexdigest()
