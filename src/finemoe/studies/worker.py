"""One run of a study in a process of its own: `python -m finemoe.studies.worker CONFIG.json DIRECTORY`.

A process apart keeps a crash to one run and lets several runs share the cores, one thread each: tiny models gain
little from a second thread. Exit status 0: finished, 3: interrupted and saved, 2: failed, with the message on stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from finemoe.core import logs
from finemoe.core.errors import FinemoeError
from finemoe.runs.config import read_config
from finemoe.runs.run import resume, train

FINISHED, FAILED, INTERRUPTED = 0, 2, 3


def run(config_path: Path, directory: Path) -> int:
    """Start or go on with the run in `directory`."""
    started = (directory / "config.json").exists()
    try:
        result = (
            resume(directory, quiet=True) if started else train(read_config(config_path), out=directory, quiet=True)
        )
    except FinemoeError as error:
        print(error, file=sys.stderr)
        return FAILED
    return INTERRUPTED if result.interrupted else FINISHED


def _stop_with_parent() -> None:
    """End, saved, when the study that started this process is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    logs.set_up()
    _stop_with_parent()
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
