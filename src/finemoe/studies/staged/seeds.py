"""Running the seeds of a study of stages side by side, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.core.logs import logger, progress
from finemoe.studies.fleet import Outcome, ended
from finemoe.studies.staged.worker import Job, examined, write_job
from finemoe.studies.worker import FAILED, FINISHED, INTERRUPTED
from finemoe.training.stopping import StopOnSignal

_POLL_SECONDS = 0.5


@dataclass
class _Active:
    name: str
    process: subprocess.Popen[bytes]
    log: Path


def run_seeds(jobs: Mapping[str, Job], parallel: int, description: str, *, quiet: bool) -> Outcome:
    """Run `jobs`, by name, `parallel` at a time; stages that are done are left as they are.

    Ctrl-C and what else asks a run to end ends every one after its step, saved, and returns with `interrupted`.
    """
    outcome, waiting, active = Outcome(), list(jobs), list[_Active]()
    total = sum(len(job.raw["stage"]) for job in jobs.values())
    shown: Any = nullcontext(lambda _: None) if quiet else progress(description, total, "stages")
    with StopOnSignal(outcome.interrupt), shown as advance:
        told = 0
        try:
            while (waiting or active) and not outcome.interrupted:
                while waiting and len(active) < parallel:
                    active.append(_start(waiting[0], jobs[waiting.pop(0)]))
                time.sleep(_POLL_SECONDS)
                for one in [one for one in active if one.process.poll() is not None]:
                    active.remove(one)
                    _conclude(one, outcome)
                done = _done(jobs.values())
                advance(done - told)
                told = done
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            for one in active:
                one.process.terminate()
            for one in active:
                one.process.wait()
    return outcome


def _done(jobs: Any) -> int:
    return sum(examined(Path(job.out), str(one["name"])).exists() for job in jobs for one in job.raw["stage"])


def _start(name: str, job: Job) -> _Active:
    folder = Path(job.out)
    path, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
    write_job(job, path)
    command: Sequence[str] = [sys.executable, "-m", "finemoe.studies.staged.worker", str(path), str(os.getpid())]
    with log.open("ab") as output:
        # A session of its own, as in `fleet`: Ctrl-C reaches this process only, which then asks each to save.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return _Active(name, process, log)


def _conclude(one: _Active, outcome: Outcome) -> None:
    status = one.process.returncode
    if status == INTERRUPTED:
        outcome.interrupted = True
    elif status != FINISHED:
        lines = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1] if status == FAILED and lines else ended(status)
        outcome.failures[one.name] = f"{said} (log: {one.log})"
        logger.error("%s failed: %s", one.name, outcome.failures[one.name])
