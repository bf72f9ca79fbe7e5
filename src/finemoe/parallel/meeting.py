"""Where the processes of a run meet: the one that is alone, or those that torchrun started."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finemoe.core.errors import FinemoeError, RunError
from finemoe.core.logs import logger
from finemoe.parallel.config import Layout
from finemoe.parallel.seat import cores, seat
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
    from finemoe.parallel import processes  # torch.distributed takes a second to load

    if device.type == "cuda":
        torch.cuda.set_device(here.local_rank)
    torch.set_num_threads(threads or cores())
    if here.rank:
        logger.setLevel(logging.ERROR)  # rank 0 says the same
    store = processes.join(here, device, timeout)
    world = processes.Processes(layout, device, store)
    try:
        yield world
    except FinemoeError:
        raise
    except RuntimeError as error:
        if not _OF_A_MEETING.search(str(error)):
            raise
        raise RunError(world.why(error)) from error
    world.close()
