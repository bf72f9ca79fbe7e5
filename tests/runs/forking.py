"""Where processes of tests are forked from: one server for each process of pytest, which has imported what takes long.

A module that sets its own list of imports would take the others' away, as there is one server.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "finemoe.studies.worker",
        "finemoe.runs.run",
        "finemoe.cli.main",
        "finemoe.checkpoint.conversion",
        "fastapi",
        "uvicorn",
        "torch._dynamo",  # by any optimizer
        "torch.distributed.elastic.agent.server.local_elastic_agent",
        "torch.distributed.fsdp",
        "torch.distributed.launcher.api",
        "torch.distributed.pipelining",
        "pytest",
    ]
)


def settle() -> None:
    """What a forked process does first, to take less of the processor for the same results.

    Without it the first collection of garbage goes through all that was imported, and copies its memory. And where
    processes of a group wait for each other, a thread of gloo that is woken takes the place of the one that woke it,
    which holds the lock that it wants, and asks for it over and over.
    """
    gc.freeze()
    if sys.platform == "linux":
        with suppress(OSError):  # not everybody may
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def finemoe(
    *arguments: str | Path, input: str | bytes | None = None, errors: str = "strict", seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """`finemoe ARGUMENTS` in a process that need not import torch first, and what it said; `input` is its stdin.

    Args:
        arguments: of the command.
        input: text, or bytes that are none.
        errors: what PYTHONIOENCODING says of such bytes.
        seconds: after which it hangs.
    """
    words = [str(one) for one in arguments]
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(input.encode() if isinstance(input, str) else input or b"")
        process = CONTEXT.Process(target=_command, args=(words, streams, errors), daemon=True)
        process.start()
        process.join(seconds)
        try:
            assert process.exitcode is not None, f"finemoe {' '.join(words)} hangs"
        finally:
            process.kill()
            process.join()
        said = [one.read_text() for one in streams[1:]]
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def _command(words: list[str], streams: list[Path], errors: str) -> None:
    settle()
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115  # multiprocessing put an empty one there
    sys.argv = ["finemoe", *words]
    from finemoe.__main__ import main

    main()
