"""Conversations as tokens, on disk: arrays one after the other, written once and mapped into memory afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from finemoe.data.arrays import open_sealed, seal
from finemoe.text.turns import Turns

FORMAT_VERSION = 3
_ARRAYS = {
    "tokens": np.uint32, "trained": np.bool_, "starts": np.int64, "asked": np.uint64, "margins": np.float32,
}  # fmt: skip


@final
@dataclass(frozen=True)
class Stored:
    """Items of one side of the split: conversations or prompts, a segment each, or pairs of two segments."""

    tokens: NDArray[Any]
    """Ids of all segments, one after the other."""
    trained: NDArray[np.bool_]
    """Of each token: the assistant wrote it, and it is to be learnt."""
    starts: NDArray[np.int64]
    """[segments + 1]: where each begins."""
    asked: NDArray[np.uint64]
    """[items]: a hash of what is asked, so that the same question is known again."""
    margins: NDArray[np.float32]
    """[items]: how much better the better answer is; NaN where nobody said."""

    def __len__(self) -> int:
        """Items."""
        return len(self.asked)

    @property
    def segments_per_item(self) -> int:
        """2 of pairs, else 1."""
        return (len(self.starts) - 1) // max(1, len(self))

    def segment(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids of one segment, and which of them are to be learnt."""
        part = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[part].astype(np.int64), self.trained[part]

    @staticmethod
    def open(folder: Path) -> Stored:
        """What `Writing.close` wrote.

        Raises:
            DamagedError: it is not what was written.
        """
        return Stored(**open_sealed(folder, _ARRAYS))


class Writing:
    """Items as they come."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[NDArray[Any]]] = {"tokens": [], "trained": []}
        self._lengths: list[int] = [0]
        self._asked: list[int] = []
        self._margins: list[float] = []

    def add(self, segments: Sequence[Turns], asked: str, margin: float | None) -> None:
        """One item; `asked` is what is asked, in words."""
        for turns in segments:
            self._pieces["tokens"].append(np.array(turns.ids, dtype=np.uint32))
            self._pieces["trained"].append(np.array(turns.trained, dtype=np.bool_))
            self._lengths.append(len(turns.ids))
        self._asked.append(int.from_bytes(hashlib.sha256(asked.encode("utf-8", "replace")).digest()[:8], "big"))
        self._margins.append(float("nan") if margin is None else margin)

    def close(self, folder: Path) -> None:
        """Write them into `folder`, which is there."""
        arrays = {
            "tokens": np.concatenate([np.empty(0, np.uint32), *self._pieces["tokens"]]),
            "trained": np.concatenate([np.empty(0, np.bool_), *self._pieces["trained"]]),
            "starts": np.cumsum(np.array(self._lengths, dtype=np.int64)),
            "asked": np.array(self._asked, dtype=np.uint64),
            "margins": np.array(self._margins, dtype=np.float32),
        }
        seal(folder, _ARRAYS, arrays)
