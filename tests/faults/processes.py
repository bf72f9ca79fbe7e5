"""Training runs in processes that can be killed. A fork server imports torch once, so a process starts at once."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from finemoe.__main__ import main
from finemoe.core.config import to_json
from finemoe.runs.config import resolve_run
from finemoe.studies import worker
from runs.forking import CONTEXT


def write_config(raw: dict[str, Any], path: Path) -> Path:
    """The resolved configuration that the worker takes."""
    path.write_text(to_json(resolve_run(raw, "test")))
    return path


def _slow_down(seconds: float) -> None:
    """A disk that takes its time, for what is saved."""
    fsync = os.fsync

    def slow(file: int) -> None:
        time.sleep(seconds)
        fsync(file)

    os.fsync = slow


def _work(config: Path, directory: Path, file_size_limit: int | None, sync_seconds: float) -> None:
    os.dup2(os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if sync_seconds:
        _slow_down(sync_seconds)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.exit(worker.run(config, directory))


def start(config: Path, directory: Path, file_size_limit: int | None = None, sync_seconds: float = 0.0) -> BaseProcess:
    """A process that starts the run in `directory`, or goes on with it; its exit code is the worker's.

    `sync_seconds`: what each sync takes longer, so that a checkpoint is being written for about seven times that.
    """
    arguments = (config, directory, file_size_limit, sync_seconds)
    process = CONTEXT.Process(target=_work, args=arguments, daemon=True)
    process.start()
    return process


def _command(arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["finemoe", *arguments]
    main()


def start_command(*arguments: str | Path, log: Path) -> BaseProcess:
    """`finemoe ARGUMENTS` in a process, which writes what it says to `log`; its exit code is the command's."""
    process = CONTEXT.Process(target=_command, args=([str(one) for one in arguments], log), daemon=True)
    process.start()
    return process


def finish(config: Path, directory: Path, file_size_limit: int | None = None) -> int:
    """Run to the end; the exit code."""
    process = start(config, directory, file_size_limit)
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def send(process: BaseProcess, number: signal.Signals) -> int:
    """Send a signal and wait; the exit code."""
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)
