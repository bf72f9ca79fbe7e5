"""Where the processes of a run meet: the one that is alone, or those that torchrun started."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finemoe.core.errors import ConfigError, FinemoeError, RunError
from finemoe.core.logs import logger
from finemoe.parallel.config import Layout
from finemoe.parallel.seat import Seat, cores, seat
from finemoe.parallel.world import SOLO, World

_OF_A_MEETING = re.compile("gloo|nccl|closed by peer|timed out|connection (reset|refused)|TCPStore", re.IGNORECASE)


@contextmanager
def meet(layout: Layout, device: torch.device, threads: int, timeout: float) -> Iterator[World]:
    """Meet the other processes of a run, if there are any, and leave them at the end.

    Args:
        layout: as many processes as are running.
        device: kind of device that the model is on; every process of a machine takes one of its own.
        threads: of the CPU, for each process; 0: an even share of the cores.
        timeout: [seconds] how long a process waits for another.

    Raises:
        RunError: a process did not come, or others waited for it in vain.
    """
    here = seat()
    if here is None or here.processes == 1:
        yield SOLO
        return
    with together(here, layout, device, threads, timeout) as world:
        yield world


@contextmanager
def together(here: Seat, layout: Layout, device: torch.device, threads: int, timeout: float) -> Iterator[World]:
    """`meet` where there are others, or as if there were: one process, too, can ask a process group."""
    from finemoe.parallel import joining, processes  # torch.distributed takes a second to load

    _take_device(device, here)
    torch.set_num_threads(threads or cores())
    level = logger.level
    if here.rank:
        logger.setLevel(logging.ERROR)  # rank 0 says the same
    world: processes.Processes | None = None
    try:
        store = joining.join(here, device, timeout)
        world = processes.Processes(layout, device, store, timeout)
        yield world
    except FinemoeError:
        raise
    except RuntimeError as error:
        if not any(_OF_A_MEETING.search(str(one)) for one in _causes(error)):
            raise
        raise RunError(str(error) if world is None else world.why(error)) from error
    finally:
        logger.setLevel(level)
        processes.leave(world)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of: a pipeline wraps what a stage met."""
    while error is not None:
        yield error
        error = error.__cause__


def _take_device(device: torch.device, here: Seat) -> None:
    """Each process of a machine takes a GPU of its own.

    Raises:
        ConfigError: there are too few, or processes cannot meet over this kind of device.
    """
    if device.type == "mps":
        raise ConfigError('several processes cannot meet over "mps": set training.device = "cpu"')
    if device.type != "cuda":
        return
    visible = torch.cuda.device_count()
    if visible == 1 and here.local_processes > 1 and "SLURM_LOCALID" in os.environ:
        return  # each process sees its own alone
    if here.local_rank >= visible:
        raise ConfigError(
            f"{here.local_processes} processes on this machine and {visible} GPUs: torchrun --nproc-per-node {visible}"
            ', or training.device = "cpu"'
        )
    torch.cuda.set_device(here.local_rank)
