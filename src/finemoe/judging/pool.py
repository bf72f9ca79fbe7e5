"""Processes that judge answers, as their parent sees them: asked in turn, and replaced when one does not answer."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from finemoe.core.child import below, end
from finemoe.core.errors import ConfigError
from finemoe.judging.verdicts import Answer, Bounds, Judged

_START_SECONDS = 60.0  # on a busy machine, with imports of a user's file
_STARTS_IN_VAIN = 3
_SUPERVISED = 30.0  # beyond its own deadline, which the sandbox keeps itself
_POLL = 0.02
_MOST_PROCESSES = 64
_MOST_REPLY = 1 << 20


@dataclass(frozen=True)
class Task:
    """One answer for one reward."""

    reward: str
    answer: Answer
    supervised: bool = False
    """It runs in the sandbox, which keeps the deadline itself and knows whose fault a program's time is."""


@dataclass(eq=False)
class _Worker:
    """One process, and what it is at."""

    process: subprocess.Popen[bytes]
    until: float
    since: float
    task: int | None = None
    """Number of what it judges; None: of nothing, or it is still starting."""
    ready: bool = False
    unsent: bytes = b""
    heard: bytearray = field(default_factory=bytearray)

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    @property
    def stdin(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def stdout(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        """Begin to send a line, which must be answered within so many seconds."""
        self.unsent += json.dumps(message, default=str).encode() + b"\n"
        self.since = time.monotonic()
        self.until = self.since + seconds

    def move(self) -> bool:
        """Send what it takes and hear what it says; whether its pipes are still open."""
        with suppress(BlockingIOError):
            while self.unsent:
                try:
                    self.unsent = self.unsent[os.write(self.stdin, self.unsent) :]
                except BrokenPipeError:
                    return False
        with suppress(BlockingIOError):
            piece = os.read(self.stdout, 1 << 16)
            self.heard += piece
            return bool(piece) and len(self.heard) <= _MOST_REPLY
        return True

    def reply(self) -> dict[str, Any] | None:
        """The line it has said, if it is whole.

        Raises:
            ValueError: what it said is no line of JSON.
        """
        if not self.heard.endswith(b"\n"):
            return None
        line, self.heard = bytes(self.heard), bytearray()
        return dict(json.loads(line))


class Pool:
    """Processes that judge by the same rewards. Nothing that an answer or a user's function does reaches the parent."""

    def __init__(self, rewards: Mapping[str, Mapping[str, Any]], bounds: Bounds, workers: int) -> None:
        """Start the first process.

        Args:
            rewards: name -> configuration, as plain values.
            bounds: of each judging.
            workers: processes at most.

        Raises:
            ConfigError: a reward cannot be made: a user's file fails, or a package is missing.
        """
        self._setup = {"rewards": rewards, "bounds": asdict(bounds)}
        self._seconds, self._most = bounds.deadline_seconds, workers
        self._workers: list[_Worker] = []
        self._vain = 0
        self._why_vain = ""
        try:
            self._start()
            while self._workers and not self._workers[0].ready:
                self._wait([], {})
            if not self._workers:
                raise ConfigError(f"the rewards cannot be computed: {self._why_vain}")
        except BaseException:
            self.close()
            raise

    def judge(self, tasks: Sequence[Task]) -> list[Judged]:
        """Each task's verdict, in order; `error` of one whose process hung, crashed or grew."""
        found: dict[int, Judged] = {}
        left = deque(range(len(tasks)))
        try:
            while len(found) < len(tasks):
                wanted = min(self._most, len(tasks) - len(found))
                while len(self._workers) < wanted and self._vain < _STARTS_IN_VAIN:
                    self._start()
                for worker in self._workers:
                    if left and worker.idle:
                        self._give(worker, left.popleft(), tasks)
                if not self._workers:
                    note = f"no process for rewards starts any more: {self._why_vain}"
                    found |= dict.fromkeys(left, Judged.error(note))
                    left.clear()
                    self._vain = 0  # the next batch may try again
                else:
                    self._wait(tasks, found)
        finally:  # an interrupt, too, leaves processes whose next answers belong to these questions
            for worker in [one for one in self._workers if one.task is not None]:
                self._end(worker)
        return [found[number] for number in range(len(tasks))]

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._workers):
            self._end(worker)

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "finemoe.judging.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        worker = _Worker(process, 0.0, 0.0)
        self._workers.append(worker)
        for end_ in (worker.stdin, worker.stdout):
            os.set_blocking(end_, False)
        worker.send(self._setup, _START_SECONDS)

    def _give(self, worker: _Worker, number: int, tasks: Sequence[Task]) -> None:
        task = tasks[number]
        worker.task = number
        seconds = self._seconds + (_SUPERVISED if task.supervised else 0.0)
        worker.send({"reward": task.reward, "answer": asdict(task.answer), "seconds": seconds}, seconds)

    def _wait(self, tasks: Sequence[Task], found: dict[int, Judged]) -> None:
        """Until something is heard or a moment has passed; take what is said, and end who is out of bounds."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if not worker.idle:
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    if worker.unsent:
                        selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            moved = {key.data for key, _ in selector.select(_POLL)}
        now = time.monotonic()
        for worker in [one for one in self._workers if not one.idle]:
            why = None
            try:
                if worker in moved and not worker.move():
                    why = "its process ended" if worker.ready else "it ended before it began"
                reply = worker.reply() if worker in moved else None
            except ValueError:
                reply, why = None, "its process wrote something else than a verdict"
            if reply is not None:
                self._take(worker, reply, found)
                continue
            if why is None and now > worker.until:
                why = f"no verdict within {worker.until - worker.since:g} seconds"
            if why is None and now - worker.since > _POLL and len(below(worker.process.pid)) > _MOST_PROCESSES:
                why = f"more than {_MOST_PROCESSES} processes started"
            if why is not None:
                self._fail(worker, why, found)

    def _take(self, worker: _Worker, reply: Mapping[str, Any], found: dict[int, Judged]) -> None:
        """What a worker said."""
        if not worker.ready:
            worker.ready, self._vain = bool(reply.get("ready")), 0 if reply.get("ready") else self._vain
            if not worker.ready:
                self._fail(worker, str(reply.get("note")), found)
            return
        assert worker.task is not None
        judged = dict(reply["judged"])
        judged["steps"] = tuple((int(place), float(value)) for place, value in judged["steps"])
        found[worker.task] = Judged(**judged)
        worker.task = None
        if not reply["fit"] or len(below(worker.process.pid)) > _MOST_PROCESSES:
            self._end(worker)

    def _fail(self, worker: _Worker, why: str, found: dict[int, Judged]) -> None:
        """End a worker; what it was at has no verdict."""
        if worker.task is not None:
            found[worker.task] = Judged.error(why)
        else:
            self._vain, self._why_vain = self._vain + 1, why
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        for pid in below(worker.process.pid):  # one that has left the group, too
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        end(worker.process)
