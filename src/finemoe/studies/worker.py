"""One run of a study in a process of its own: `python -m finemoe.studies.worker CONFIG.json DIRECTORY PARENT`.

A process apart keeps a crash to one run and lets several runs share the cores, one thread each: tiny models gain
little from a second thread. Exit status 0: finished, 3: interrupted and saved, 2: failed, with the message on stderr.

PARENT is the process id of the study. When that process ends, however it ends, this one is told to stop by SIGTERM from
its first line on: before a run has begun that ends it at once, and later it saves first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

FINISHED, FAILED, INTERRUPTED = 0, 2, 3
_PR_SET_PDEATHSIG = 1  # of Linux: a signal when the thread that started this process ends


def run(config_path: Path, directory: Path) -> int:
    """Start or go on with the run in `directory`."""
    from finemoe.core.errors import FinemoeError  # torch comes along, which takes seconds
    from finemoe.runs.config import read_config
    from finemoe.runs.run import resume, train

    started = (directory / "config.json").exists()
    try:
        result = (
            resume(directory, quiet=True) if started else train(read_config(config_path), out=directory, quiet=True)
        )
    except FinemoeError as error:
        print(error, file=sys.stderr)
        return FAILED
    return INTERRUPTED if result.interrupted else FINISHED


def stop_with_parent(parent: int) -> None:
    """Have this process stopped by SIGTERM when `parent` is gone, or at once where it is gone already."""
    if sys.platform != "linux" or ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        sys.exit(INTERRUPTED)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    stop_with_parent(int(sys.argv[3]))

    from finemoe.core import logs

    logs.set_up()
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
