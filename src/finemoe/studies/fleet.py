"""Running many training runs side by side, each in its own process, with one live picture of all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finemoe.core.config import to_json
from finemoe.core.files import write_text
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import console, logger
from finemoe.core.reading import decode_json
from finemoe.model.size import measure
from finemoe.runs.config import RunConfig
from finemoe.studies.worker import FAILED, FINISHED, INTERRUPTED
from finemoe.training.directory import METRICS, check_record, summary_if_whole
from finemoe.training.stopping import StopOnSignal

_POLL_SECONDS = 0.5
_PLAIN_SECONDS = 30.0
_ORPHAN_SECONDS = 600.0
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    name: str
    config: RunConfig
    directory: Path

    @property
    def work(self) -> float:
        """Training FLOPs, the unit of the overall progress."""
        training = self.config.training
        size = measure(self.config.model, self.config.data.sequence_length)
        return size.training_flops_per_token * training.total_steps * training.tokens_per_step

    @property
    def finished(self) -> bool:
        """Whether its summary is there."""
        return summary_if_whole(self.directory) is not None


@dataclass
class Outcome:
    """What became of a fleet."""

    interrupted: bool = False
    failures: dict[str, str] = field(default_factory=dict)
    """By job name: the message of a run that could not go on."""

    def interrupt(self) -> None:
        """Somebody asked it to end: at once, as Ctrl-C does; not again while the runs save."""
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt


class Named(Protocol):
    """What is run in a process of its own."""

    @property
    def name(self) -> str:
        """What it is called where it fails."""
        ...


Work = TypeVar("Work", bound=Named)


@dataclass
class Active(Generic[Work]):
    """A process at work."""

    job: Work
    process: subprocess.Popen[bytes]
    log: Path


def run_fleet(jobs: Sequence[Job], parallel: int, *, description: str, quiet: bool) -> Outcome:
    """Run `jobs` in order, `parallel` at a time; finished ones are skipped, begun ones go on: as of `run_processes`."""
    waiting = [job for job in jobs if not job.finished]
    board = _Board(jobs, description, quiet)
    try:
        return run_processes(waiting, parallel, _start, finished=board.finished, refresh=board.refresh)
    finally:
        board.close()


def run_processes(
    jobs: Sequence[Work],
    parallel: int,
    start: Callable[[Work], Active[Work]],
    *,
    finished: Callable[[Work], object],
    refresh: Callable[[Sequence[Work]], object],
) -> Outcome:
    """Start `jobs` in order, `parallel` at a time, and tell `finished` of each that ended well.

    Ctrl-C, a closed terminal and what else asks a run to end (`POLITE`) end every active one after its step, saved, and
    return with `interrupted`. `refresh` is told what is active, twice a second.
    """
    outcome, waiting, active = Outcome(), list(jobs), list[Active[Work]]()
    with StopOnSignal(outcome.interrupt):
        try:
            while (waiting or active) and not outcome.interrupted:
                while waiting and len(active) < parallel:
                    active.append(start(waiting.pop(0)))
                time.sleep(_POLL_SECONDS)
                for one in [one for one in active if one.process.poll() is not None]:
                    active.remove(one)
                    if _conclude(one, outcome):  # a worker that was told to stop interrupts the study too
                        finished(one.job)
                refresh([one.job for one in active])
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            for one in active:
                one.process.terminate()
            for one in active:
                one.process.wait()
    return outcome


def _start(job: Job) -> Active[Job]:
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    config = job.directory.with_name(f"{job.directory.name}.json")
    write_text(config, to_json(job.config))
    wait_for_orphan(job.directory)
    log = job.directory.with_name(f"{job.directory.name}.log")
    return Active(job, start_worker("finemoe.studies.worker", [str(config), str(job.directory)], log), log)


def start_worker(module: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A module of ours in a process that is told who began it, and writes what it says to `log`."""
    command = [sys.executable, "-m", module, *arguments, str(os.getpid())]
    with log.open("ab") as output:
        # A session of its own: a terminal's Ctrl-C reaches this process only, which then asks each run to save.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def wait_for_orphan(directory: Path) -> None:
    """Wait for the run that a killed study left behind: it was told to stop, and saves after its step."""
    if not directory.is_dir():
        return
    try:
        with exclusive_lock(
            directory / ".lock",
            patience=_ORPHAN_SECONDS,
            on_wait=lambda: logger.info("%s: waiting for an earlier process to save and end", directory),
        ):
            return
    except (TimeoutError, OSError) as error:  # the worker meets the same, and says what it is
        logger.debug("%s: %s", directory, error)


def _conclude(one: Active[Any], outcome: Outcome) -> bool:
    """Whether it ended well."""
    status = one.process.returncode
    if status == INTERRUPTED:
        outcome.interrupted = True
    elif status != FINISHED:
        lines = one.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1] if status == FAILED and lines else ended(status)
        outcome.failures[one.job.name] = f"{said} (log: {one.log})"
        logger.error("%s failed: %s", one.job.name, outcome.failures[one.job.name])
    return bool(status == FINISHED)


def ended(status: int) -> str:
    """What to say of a process that left no word of its own."""
    if status == -signal.SIGKILL:
        return "was killed, as processes are when memory runs out; fewer at a time need less"
    return f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"


class _Board:
    """The live picture: one bar for everything, one line for each active run; plain lines on a pipe."""

    def __init__(self, jobs: Sequence[Job], description: str, quiet: bool) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._done = {job.name: job.work if job.finished else 0.0 for job in jobs}
        self._total = sum(job.work for job in jobs)
        self._before = sum(self._done.values())
        self._started = self._last = time.monotonic()
        self._quiet = quiet
        self._description = description
        self._progress: Progress | None = None
        self._rows: dict[str, TaskID] = {}
        screen = console()
        if screen.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            times = (TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=False))
            self._progress = Progress(*columns, *times, console=screen, transient=True, speed_estimate_period=600)
            self._progress.start()
            self._overall = self._progress.add_task(description, total=self._total)
            self._progress.update(self._overall, completed=self._before)

    def refresh(self, active: Sequence[Job]) -> None:
        """Read the active runs' newest records and show them."""
        states = {job.name: _newest(job) for job in active}
        for job in active:
            share = states[job.name].get("step", 0) / job.config.training.total_steps
            self._done[job.name] = job.work * share
        done = sum(self._done.values())
        if self._progress is not None:
            self._show(self._progress, active, states, done)
        elif not self._quiet and time.monotonic() - self._last > _PLAIN_SECONDS:
            self._last = time.monotonic()
            fresh = done - self._before
            left = (self._last - self._started) * (self._total - done) / fresh if fresh else None
            running = "; ".join(_line(job, states[job.name]) for job in active)
            until = "" if left is None else f", {left:.0f} s left"
            logger.info("%s %.0f %%%s: %s", self._description, 100 * done / self._total, until, running)

    def _show(self, progress: Progress, active: Sequence[Job], states: dict[str, Any], done: float) -> None:
        for name in [name for name in self._rows if name not in states]:
            progress.remove_task(self._rows.pop(name))
        for job in active:
            if job.name not in self._rows:
                self._rows[job.name] = progress.add_task(job.name, total=job.work)
            line = _line(job, states[job.name])
            progress.update(self._rows[job.name], completed=self._done[job.name], description=line)
        progress.update(self._overall, completed=done)

    def finished(self, job: Job) -> None:
        """A run ended well."""
        self._done[job.name] = job.work
        summary = summary_if_whole(job.directory)
        if not self._quiet and summary is not None:
            logger.info(
                "%-24s loss %.4f  %.2f M tokens in %.0f s",
                job.name,
                summary["final_validation_loss"],
                summary["tokens"] / 1e6,
                summary["seconds"],
            )

    def close(self) -> None:
        """Take the picture away."""
        if self._progress is not None:
            self._progress.stop()


def _newest(job: Job) -> dict[str, Any]:
    """The last step of a run, with the last validation loss, from the end of its metrics file."""
    try:
        with (job.directory / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:  # not begun
        return {}
    newest: dict[str, Any] = {}
    for line in reversed(lines):
        try:
            record = dict(decode_json(line))
            check_record(record)
        except (ValueError, TypeError):  # the first line of the tail is cut; any other may be damaged
            break
        newest = {**record, **newest}
        if record["kind"] == "validation":
            break
    return newest


def _line(job: Job, state: dict[str, Any]) -> str:
    if "loss" not in state:
        return f"{job.name:20.20s} starting"
    validation = f"{state['validation_loss']:.3f}" if "validation_loss" in state else "  -  "
    speed = state["tokens_per_second"] / 1000
    return f"{job.name:20.20s} {state['loss']:.3f} val {validation} {speed:4.1f}k/s"
