"""Processes that judge answers, as their parent sees them: asked in turn, and replaced when one does not answer."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from finemoe.core.child import below, end_all, has_ended
from finemoe.core.errors import ConfigError
from finemoe.core.logs import logger
from finemoe.judging import KINDS
from finemoe.judging.verdicts import Answer, Bounds, Judged

_START_SECONDS = 60.0  # on a busy machine, with imports of a user's file
_STARTS_IN_VAIN = 3
_SUPERVISED = 30.0  # beyond its own deadline, which the sandbox keeps itself
_POLL = 0.02
_AHEAD, _AHEAD_SECONDS = 32, 0.05  # requests that wait in a process: so many, or so much work, at most
_SILENT = 5  # times in a row that nothing was said in time, before the other answers of a batch are not tried
_SLOW_SECONDS, _FEW = 0.5, 2  # of an answer, from where on there are more processes than a few
_NOT_TRIED = "not tried"
_MOST_PROCESSES = 64
_MOST_REPLY = 1 << 20


@dataclass(frozen=True)
class _Task:
    """One answer for one reward."""

    number: int
    """Of the answer."""
    reward: str


@dataclass(eq=False)
class _Worker:
    """One process, and what it is at."""

    process: subprocess.Popen[bytes]
    since: float
    """When it began with the first of its tasks, or to start."""
    ready: bool = False
    tasks: deque[_Task] = field(default_factory=deque)
    """What it was sent and has not answered, in order."""
    fit: bool = True
    """It can judge more: what it ran last has not spoilt it."""
    unsent: bytes = b""
    heard: bytes = b""

    @property
    def pipes(self) -> tuple[int, int]:
        """The ends of its stdin and stdout that are here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin.fileno(), self.process.stdout.fileno()

    @property
    def is_slow(self) -> bool:
        """Whether it has been at one answer for long."""
        return self.ready and bool(self.tasks) and time.monotonic() - self.since > _SLOW_SECONDS

    def move(self) -> bool:
        """Send what it takes and hear what it says; whether its pipes are still open."""
        to, of = self.pipes
        with suppress(BlockingIOError):
            while self.unsent:
                try:
                    self.unsent = self.unsent[os.write(to, self.unsent) :]
                except BrokenPipeError:
                    break  # what it said before is still to be heard
        with suppress(BlockingIOError):
            piece = os.read(of, 1 << 16)
            self.heard += piece
            return bool(piece) and len(self.heard) <= _MOST_REPLY
        return True

    def replies(self) -> list[dict[str, Any]]:
        """The lines that it has said.

        Raises:
            ValueError: one of them is no JSON.
        """
        *lines, self.heard = self.heard.split(b"\n")
        return [dict(json.loads(line)) for line in lines]


class Pool:
    """Processes that judge by the same rewards. Nothing that an answer or a user's function does reaches the parent."""

    def __init__(
        self,
        rewards: Mapping[str, Mapping[str, Any]],
        bounds: Bounds,
        workers: int,
        on_failure: Callable[[str, str], object] = lambda reward, note: None,
    ) -> None:
        """Start the first process.

        Args:
            rewards: name -> configuration, as plain values.
            bounds: of each judging.
            workers: processes at most.
            on_failure: is told at once of every `error` that a process met: the reward, and its note.

        Raises:
            ConfigError: a reward cannot be made: a user's file fails, or a package is missing.
        """
        self._setup = json.dumps({"rewards": rewards, "bounds": asdict(bounds)}).encode() + b"\n"
        self._seconds = {
            name: bounds.deadline_seconds + (_SUPERVISED if KINDS[one["kind"]].supervised else 0.0)
            for name, one in rewards.items()
        }
        self._pace = dict.fromkeys(rewards, 1.0)  # seconds that one answer takes, of late
        self._most, self._vain, self._why_vain = workers, 0, ""
        self._on_failure = on_failure
        self._silent = Counter[str]()  # by reward: answers without a verdict in time since the last that had one
        self.files: dict[str, str] = {}
        """By reward, the sha256 of the user's file, as the process that started last loaded it."""
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end_all, self._workers)  # of who forgot to close it, or ended before
        try:
            self._start()
            while self._workers and not self._workers[0].ready:
                self._wait({})
            if not self._workers:
                raise ConfigError(f"the rewards cannot be computed: {self._why_vain}")
        except BaseException:
            self.close()
            raise

    def judge(self, answers: Sequence[Answer]) -> list[dict[str, Judged]]:
        """What each reward says of each answer; `error` where its process hung, crashed or grew.

        A reward that says nothing in time of several answers, one after the other, and of none before them, is not
        tried on the rest.
        """
        order = by_turns(answers)
        left = deque(_Task(number, reward) for reward in self._seconds for number in order)
        texts = [json.dumps({**vars(one), "record": dict(one.record)}, default=str) for one in answers]
        found: dict[_Task, Judged] = {}
        everything, slow, spoke = len(left), False, set[str]()
        for worker in [one for one in self._workers if has_ended(one.process)]:  # since the last batch
            self._end(worker)
        try:
            while len(found) < everything:
                slow = slow or any(one.is_slow for one in self._workers)
                wanted = min(self._most if slow else _FEW, self._most, everything - len(found))
                while len(self._workers) < wanted and self._vain < _STARTS_IN_VAIN:
                    self._start()
                for worker in self._workers:
                    self._give(worker, left, texts)
                if not self._workers:
                    note = f"no process for rewards starts any more: {self._why_vain}"
                    found |= dict.fromkeys(left, Judged.error(note))
                    self._vain = 0  # the next batch may try again
                    break
                known = len(found)
                left.extendleft(reversed(self._wait(found)))
                for task, judged in islice(found.items(), known, None):
                    if judged.verdict == "error":
                        self._on_failure(task.reward, judged.note)
                    else:
                        spoke.add(task.reward)
                        self._silent[task.reward] = 0
                self._give_up(left, found, spoke, len(answers))
        finally:  # an interrupt, too, leaves processes whose next answers belong to these questions
            for worker in [one for one in self._workers if one.tasks]:
                self._end(worker)
        return [{reward: found[_Task(number, reward)] for reward in self._seconds} for number in range(len(answers))]

    def _give_up(self, left: deque[_Task], found: dict[_Task, Judged], spoke: set[str], answers: int) -> None:
        """Take out of `left` what is of a reward that says nothing in time, of any answer."""
        for reward in [one for one, times in self._silent.items() if times >= _SILENT and one not in spoke]:
            late = sum(one.reward == reward and judged.note == self._late(reward) for one, judged in found.items())
            if not late or all(one.reward != reward for one in left):
                continue
            if not any(judged.note.startswith(_NOT_TRIED) for one, judged in found.items() if one.reward == reward):
                logger.warning(
                    "reward %s: %d of %d answers could not be judged, and none could: %s; the others are not tried",
                    reward, late, answers, self._late(reward),
                )  # fmt: skip
            note = f"{_NOT_TRIED}, as of {late} before it there was {self._late(reward)}"
            found |= {one: Judged.error(note) for one in left if one.reward == reward}
            rest = [one for one in left if one.reward != reward]
            left.clear()
            left.extend(rest)

    def _late(self, reward: str) -> str:
        return f"no verdict within {self._seconds[reward]:g} seconds"

    def close(self) -> None:
        """End all processes."""
        _end_all(self._workers)

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "finemoe.judging.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        worker = _Worker(process, time.monotonic(), unsent=self._setup)
        for pipe in worker.pipes:
            os.set_blocking(pipe, False)
        self._workers.append(worker)

    def _give(self, worker: _Worker, left: deque[_Task], texts: Sequence[str]) -> None:
        """Tasks ahead of what a worker is at: many that are quick, and one that is slow."""
        while worker.ready and left:
            task = left[0]
            if worker.tasks and len(worker.tasks) >= min(_AHEAD, _AHEAD_SECONDS / self._pace[task.reward]):
                return
            if not worker.tasks:
                worker.since = time.monotonic()
            worker.tasks.append(left.popleft())
            head = json.dumps({"reward": task.reward, "seconds": self._seconds[task.reward]})
            worker.unsent += f'{head[:-1]}, "answer": {texts[task.number]}}}\n'.encode()

    def _wait(self, found: dict[_Task, Judged]) -> list[_Task]:
        """Until something is heard or a moment has passed; take what is said, and end who is out of bounds.

        Returns:
            Tasks of those who were ended, which others have to do.
        """
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                to, of = worker.pipes
                selector.register(of, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(to, selectors.EVENT_WRITE, worker)
            moved = {key.data for key, _ in selector.select(_POLL)}
        undone: list[_Task] = []
        for worker in list(self._workers):
            why = self._hear(worker, found) if worker in moved else None
            late = time.monotonic() - worker.since
            busy = bool(worker.tasks) or not worker.ready
            seconds = self._seconds[worker.tasks[0].reward] if worker.tasks else _START_SECONDS
            if why is None and busy and late > seconds:
                why = "it does not start"
                if worker.ready:
                    why = self._late(worker.tasks[0].reward)
                    self._silent[worker.tasks[0].reward] += 1
            if why is None and (late > _POLL or worker in moved) and len(below(worker.process.pid)) > _MOST_PROCESSES:
                why = f"more than {_MOST_PROCESSES} processes started"
            if why is not None or not worker.fit:
                undone += self._fail(worker, why, found)
        return undone

    def _hear(self, worker: _Worker, found: dict[_Task, Judged]) -> str | None:
        """Take what a worker says; why it has to be ended, if it has."""
        opened = worker.move()
        try:
            for reply in worker.replies():
                now = time.monotonic()
                if not worker.ready:
                    if not reply["ready"]:
                        return str(reply["note"])
                    self._know(reply["files"])
                    worker.ready, self._vain = True, 0
                    continue
                task = worker.tasks.popleft()
                judged = reply["judged"]
                found[task] = Judged(**{**judged, "steps": tuple((place, value) for place, value in judged["steps"])})
                self._pace[task.reward] += 0.25 * (now - worker.since - self._pace[task.reward])
                worker.since = now
                if not reply["fit"]:
                    worker.fit = False
                    return None
        except (ValueError, KeyError, TypeError, IndexError):
            return "its process wrote something else than a verdict"
        return None if opened else "its process ended"

    def _know(self, files: Mapping[str, str]) -> None:
        """Keep what a new process has loaded, and tell where that is another file than others judged by."""
        for reward, mark in files.items():
            if (before := self.files.get(reward, mark)) != mark:
                logger.warning(
                    "reward %s: its file has changed (sha256 %s before, now %s): processes that start from now on "
                    "judge by what it is now, those before by what it was. Put it back, or end here and go on again",
                    reward, before[:12], mark[:12],
                )  # fmt: skip
        self.files |= files

    def _fail(self, worker: _Worker, why: str | None, found: dict[_Task, Judged]) -> list[_Task]:
        """End a worker; with a reason, what it was at has no verdict. What it had not begun with is returned."""
        if why is not None and worker.tasks:
            found[worker.tasks.popleft()] = Judged.error(why)
        elif why is not None and not worker.ready:
            self._vain, self._why_vain = self._vain + 1, why
        self._end(worker)
        return list(worker.tasks)

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        end_all(worker.process)


def by_turns(answers: Sequence[Answer]) -> list[int]:
    """Their numbers: one to each question first, since a single question may be what a reward cannot bear."""
    seen = Counter[str]()
    turns = []
    for one in answers:
        turns.append(seen[one.prompt])
        seen[one.prompt] += 1
    return sorted(range(len(answers)), key=turns.__getitem__)


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        end_all(workers.pop().process)
