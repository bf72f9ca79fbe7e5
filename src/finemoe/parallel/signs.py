"""Signs of life: who is the reason when processes wait in vain."""

from __future__ import annotations

import threading
import time
from typing import final

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # torch does not list it

_BEAT = 2.0
"""[seconds] Between two signs of life of a process."""
SILENT = 8.0
"""[seconds] Without one, after which a process is taken for stopped or gone."""


@final
class SignsOfLife:
    """What every process writes into the store: that it lives, and how many meetings it has come to."""

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._meetings = 0
        self._ended = threading.Event()
        if store is not None:
            self._say(store)
            threading.Thread(target=self._run, args=(store,), name="signs of life", daemon=True).start()

    def count(self) -> None:
        """One more meeting."""
        self._meetings += 1

    def stop(self) -> None:
        """The process ends well."""
        self._ended.set()

    def missing(self) -> list[int]:
        """Ranks that have not been heard of between two looks."""
        before = self._heard()
        if not before:
            return []
        time.sleep(SILENT)
        after = self._heard()
        return [rank for rank, said in before.items() if rank != self._rank and said == after.get(rank)]

    def behind(self) -> list[int]:
        """Ranks that came to fewer meetings than the others."""
        meetings = {rank: int(said.split()[1]) for rank, said in self._heard().items()}
        most = max(meetings.values(), default=0)
        return [rank for rank, count in meetings.items() if count < most]

    def _heard(self) -> dict[int, bytes]:
        if self._store is None:
            return {}
        try:
            return {rank: self._store.get(f"alive/{rank}") for rank in range(self._size)}
        except (RuntimeError, dist.DistError):  # the store went with its process
            return {}

    def _say(self, store: Store) -> None:
        store.set(f"alive/{self._rank}", f"{time.time():.3f} {self._meetings}")

    def _run(self, store: Store) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._say(store)
            except (RuntimeError, dist.DistError):
                return
