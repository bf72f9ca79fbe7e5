"""Functions run by several processes that reach each other over gloo. A fork server imports torch once.

The function and its arguments are pickled, so it stands at the top of a module of tests; what it returns comes back
pickled too, tensors as bytes and not through shared memory, which would end with the process that made it.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from finemoe.model import native
from runs.forking import CONTEXT, settle


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    deadline: float = 60,
    met: bool = True,
    context: Any = CONTEXT,
) -> list[Any]:
    """What `function(*args)` returns on each rank, by rank.

    Each rank is a process of one thread whose default process group is initialised: `torch.distributed.get_rank()`
    tells them apart. With `met` False they have not met, and find in the environment what torchrun would have said.
    Warnings are errors there, as in every test. `context` is of `multiprocessing`, and says how processes are started.

    Raises:
        AssertionError: a rank failed, with its traceback, or is not done after `deadline` seconds; no process is left.
    """
    native.available()  # compiled where they never were, for which no deadline of a test is long enough
    work = pickle.dumps((function, args))
    free_port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, int] = {}
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                place = (rank, world_size, Path(folder) / "store" if met else free_port, deadline)
                processes.append(context.Process(target=_work, args=(theirs, work, *place), daemon=True))
                processes[-1].start()
                theirs.close()
                ranks[ours] = rank
            results = _gather(ranks, deadline)
            for process in processes:
                process.join(10)
            return [results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def several(work: list[tuple[Any, ...]]) -> list[Any]:
    """One result for each `(function, *arguments)`: processes are started once."""
    return [function(*arguments) for function, *arguments in work]


def _gather(ranks: dict[Connection, int], deadline: float) -> dict[int, Any]:
    """Results by rank. A rank that fails takes others with it: the first error is the one to read."""
    until = time.monotonic() + deadline
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [connection for connection, rank in ranks.items() if rank not in results]
        ready = wait(waiting, max(0.0, until - time.monotonic()))
        late = sorted(ranks[connection] for connection in waiting)
        assert ready, f"ranks {late} of {len(ranks)} are not done after {deadline} seconds"
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                well, result = pickle.loads(connection.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {ranks[connection]} ended without a word") from None
            assert well, f"rank {ranks[connection]} failed:\n{result}"
            results[ranks[connection]] = result
    return results


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _work(
    connection: Connection, work: bytes, rank: int, world_size: int, meeting: Path | int, deadline: float
) -> None:
    settle()
    warnings.simplefilter("error")
    faulthandler.dump_traceback_later(0.9 * deadline, file=sys.__stderr__)  # says where a rank waits for ever
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        if isinstance(meeting, int):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            os.environ.update({name: str(place) for name, place in places.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(meeting))
        else:
            distributed.init_process_group(
                "gloo",
                store=distributed.FileStore(str(meeting), world_size),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=deadline),
            )
        function, args = pickle.loads(work)
        answer = (True, function(*args))
        if distributed.is_initialized():
            distributed.barrier()  # nobody leaves while others still read from it
            distributed.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    connection.close()
    faulthandler.cancel_dump_traceback_later()
