"""A teacher's most probable tokens on disk, so that it need not be in memory while a student learns from it.

They are found by the content of what was read, a conversation or a row of documents: in which batch, in what order and
in which epoch it comes does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from finemoe.core.errors import DataError
from finemoe.core.logs import progress
from finemoe.data.arrays import open_sealed, seal
from finemoe.data.cache import open_or_build
from finemoe.data.config import DataConfig
from finemoe.methods.distillation.teacher import Reading
from finemoe.model.divergence import BestOfTeacher
from finemoe.model.transformer import Transformer

FORMAT_VERSION = 1
_CHUNK_ELEMENTS = 1 << 21
_ARRAYS = {"keys": np.uint8, "starts": np.int64, "ids": np.uint32, "logprobs": np.float32}
_KEY = 16
"""[bytes]"""


@final
@dataclass(frozen=True)
class Recorded:
    """What a teacher said, in files that are mapped into memory: `teacher.Teacher`."""

    keys: NDArray[Any]
    """[pieces, bytes]: what each piece is known by."""
    starts: NDArray[Any]
    """[pieces]: where its tokens begin."""
    ids: NDArray[Any]
    """[tokens, k]: of those that have a weight, the most probable first."""
    logprobs: NDArray[Any]
    """[tokens, k] in nats."""

    def __call__(self, reading: Reading, places: Tensor) -> BestOfTeacher:
        """As in `Teacher`.

        Raises:
            DataError: it holds something that the teacher has not read.
        """
        rows = [np.empty(0, np.int64)]
        for key, count in keys_of(reading):
            start = self._found.get(key)
            if start is None:
                raise DataError("a batch holds a text that the teacher has not read: remove the cache folder")
            rows.append(np.arange(start, start + count))
        chosen = np.concatenate(rows)
        ids, logprobs = torch.from_numpy(self.ids[chosen].astype(np.int64)), torch.from_numpy(self.logprobs[chosen])
        return BestOfTeacher(ids.to(places.device), logprobs.to(places.device))

    @cached_property
    def _found(self) -> dict[bytes, int]:
        return dict(zip(map(bytes, self.keys), self.starts.tolist(), strict=True))

    @staticmethod
    def open(folder: Path) -> Recorded:
        """What `record` wrote.

        Raises:
            DamagedError: it is not what was written.
        """
        return Recorded(**open_sealed(folder, _ARRAYS))


def record(
    readings: Callable[[], Iterable[Reading]],
    model: Transformer,
    mark: str,
    k: int,
    temperature: float,
    vocab: int,
    config: DataConfig,
) -> Recorded:
    """The `k` most probable tokens of `model` everywhere in `readings`; from the cache where it was asked before.

    Args:
        readings: all that will be read, in pieces; asked for twice.
        model: the teacher.
        mark: its fingerprint.
        k: so many.
        temperature: its logits are divided by it.
        vocab: ids that it is asked about.
        config: names the folder of the cache.
    """
    found: dict[bytes, int] = {}
    total = 0
    for reading in readings():
        for key, count in keys_of(reading):
            if key not in found:
                found[key] = total
                total += count
    cache = config.cache
    facts = repr((FORMAT_VERSION, mark, k, temperature, vocab)).encode() + b"".join(found)
    folder = cache / "teachers" / hashlib.sha256(facts).hexdigest()[:32]

    def build(fresh: Path) -> None:
        ids, logprobs = (
            open_memmap(fresh / f"{name}.npy", mode="w+", dtype=_ARRAYS[name], shape=(total, k))
            for name in ("ids", "logprobs")
        )
        written: set[bytes] = set()
        with progress("asking the teacher", total, "tokens") as advance:
            for reading in readings():
                best = best_of(model, reading, k, temperature, vocab)
                place = 0
                for key, count in keys_of(reading):
                    if key not in written:
                        rows = slice(found[key], found[key] + count)
                        ids[rows] = best.ids[place : place + count].cpu().numpy()
                        logprobs[rows] = best.logprobs[place : place + count].cpu().numpy()
                        written.add(key)
                        advance(count)
                    place += count
        keys, starts = np.frombuffer(b"".join(found), np.uint8).reshape(-1, _KEY), np.array(list(found.values()))
        arrays: dict[str, NDArray[Any]] = {"keys": keys, "starts": starts, "ids": ids, "logprobs": logprobs}
        ids.flush()
        logprobs.flush()
        seal(fresh, _ARRAYS, arrays)

    return open_or_build(folder, Recorded.open, build)


@torch.no_grad()
def best_of(model: Transformer, reading: Reading, k: int, temperature: float, vocab: int) -> BestOfTeacher:
    """The `k` most probable of `vocab` ids after each token that has a weight, a chunk at a time."""
    device = model.embedding.weight.device
    reading = Reading(reading.rows.to(device), reading.sequences, reading.isolate, reading.packed)
    hidden = reading.through(model).hidden.flatten(0, 1)[reading.places]
    rows = max(1, _CHUNK_ELEMENTS // vocab)
    found = [
        (model.logits(hidden[start : start + rows]).float()[:, :vocab] / temperature).log_softmax(-1).topk(k)
        for start in range(0, max(1, len(hidden)), rows)
    ]
    return BestOfTeacher(torch.cat([one.indices for one in found]), torch.cat([one.values for one in found]))


def keys_of(reading: Reading) -> Iterator[tuple[bytes, int]]:
    """What each piece of a reading is known by, and how many of its tokens have a weight; in order.

    A piece is what decides its tokens' distributions alone: a document of a packed row, or else a whole row.
    """
    rows = reading.rows
    columns = [one.flatten().cpu().numpy() for one in (rows.tokens, rows.targets, rows.positions, rows.weights)]
    if reading.packed:
        edges = np.flatnonzero(np.diff(rows.documents[0].cpu().numpy())) + 1
    else:
        edges = np.arange(1, len(rows.tokens)) * rows.tokens.shape[1]
    for tokens, targets, positions, weights in zip(*(np.split(one, edges) for one in columns), strict=True):
        digest = hashlib.blake2b(b"isolate" if reading.isolate else b"concatenate", digest_size=_KEY)
        for column in (tokens, targets, positions, weights > 0):
            digest.update(np.ascontiguousarray(column).tobytes())
        yield digest.digest(), int((weights > 0).sum())
