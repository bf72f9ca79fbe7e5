"""How processes that torchrun started meet in torch's default group, on one machine or on many."""

from __future__ import annotations

import itertools
import time
import uuid
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them

from finemoe.core.errors import RunError
from finemoe.parallel.seat import Seat
from finemoe.parallel.world import in_words


def join(seat: Seat, device: torch.device, timeout: float) -> Store:
    """Meet the other processes in torch's default group.

    Args:
        seat: of this process.
        device: where the model will be.
        timeout: [seconds] how long a process waits for another, here and in every collective.

    Returns:
        Where all can read and write small things, while the process that keeps it lives.

    Raises:
        RunError: not all came in time.
    """
    wait = timedelta(seconds=timeout)
    try:
        base = _meeting_place(seat.address, seat.port, not seat.hosted and seat.rank == 0, timeout)
        store = PrefixStore(_invitation(seat, PrefixStore(f"finemoe/{next(_MEETINGS)}", base), timeout), base)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.processes, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {seat.rank} of {seat.processes} did not meet the others at {seat.address}:{seat.port}: {error}"
        ) from error
    return store


_MEETINGS = itertools.count()
"""Of this process; all processes train the same runs in the same order."""


def _invitation(seat: Seat, store: Store, timeout: float) -> str:
    """A name that only the processes of this very attempt know: else addresses of dead ones would be read.

    Agents of several machines count attempts each for itself, so no count will do. Every process leaves a word of its
    own; rank 0 answers those words that it finds, until all have taken the same answer.
    """
    own = uuid.uuid4().hex
    if seat.rank:
        store.set(f"here/{seat.rank}", own)
        store.wait([f"welcome/{own}"], timedelta(seconds=timeout))
        name = store.get(f"welcome/{own}").decode()
        store.set(f"{name}/{seat.rank}", "taken")
        return name
    until = time.monotonic() + timeout
    others = range(1, seat.processes)
    while time.monotonic() < until:
        missing = [rank for rank in others if not store.check([f"{own}/{rank}"])]
        if not missing:
            return own
        for rank in missing:
            if store.check([f"here/{rank}"]):
                store.set(f"welcome/{store.get(f'here/{rank}').decode()}", own)
        time.sleep(0.02)
    raise RuntimeError(f"{in_words(missing)} did not come within {timeout:g} s")


@cache
def _meeting_place(address: str, port: int, hosts: bool, timeout: float) -> TCPStore:
    """One for all runs of a process: who keeps it cannot open the port twice."""
    return TCPStore(address, port, is_master=hosts, timeout=timedelta(seconds=timeout))
