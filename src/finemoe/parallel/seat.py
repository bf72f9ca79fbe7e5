"""Where a process stands among those that torchrun started, by what it was told in its environment."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass

from finemoe.core.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Seat:
    """One of several processes. torch itself is not needed to know it."""

    rank: int
    """Of all processes, from 0."""
    processes: int
    local_rank: int
    """Of those on this machine, from 0."""
    local_processes: int
    address: str
    port: int
    hosted: bool
    """torchrun keeps the store at which the processes meet; else rank 0 does."""


def seat() -> Seat | None:
    """The place of this process; None where it is alone.

    Raises:
        ConfigError: the environment says half of it.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in _NAMES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment says RANK or WORLD_SIZE, and not {', '.join(missing)}: start finemoe with "
            "`torchrun --nproc-per-node N -m finemoe train ...`, which sets them all, or unset RANK and WORLD_SIZE"
        )
    try:
        rank, processes, local_rank, local, port = (int(os.environ[n]) for n in _NAMES if n != "MASTER_ADDR")
    except ValueError as error:
        raise ConfigError(f"the environment of torchrun holds what is no number: {error}") from error
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Seat(rank, processes, local_rank, local, os.environ["MASTER_ADDR"], port, hosted)


def resuming(directory: str | os.PathLike[str]) -> str:
    """The command that goes on with a run by as many processes as there are, quoted for a shell."""
    here, own = seat(), f"finemoe resume {shlex.quote(os.fspath(directory))}"
    if here is None or here.processes == 1:
        return own
    if here.local_processes == here.processes:
        return f"torchrun --nproc-per-node {here.processes} -m {own}"
    nodes = f"--nnodes {here.processes // here.local_processes} --nproc-per-node {here.local_processes}"
    return f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint {here.address}:29500 -m {own}"


def speaks() -> bool:
    """Whether this process is the one that prints: alone, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """Of the processor, that this process may use: its share where several run on one machine."""
    here = os.cpu_count() or 1
    if sys.platform == "linux":
        here = len(os.sched_getaffinity(0))
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
