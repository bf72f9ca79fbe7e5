"""A model at work: its engine in a thread of its own, which the server's event loop talks to and never waits for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from finemoe.core.errors import FinemoeError
from finemoe.core.logs import logger
from finemoe.generation.engine import Engine, Event, Request
from finemoe.generation.sequence import Sequence as Written


@dataclass(frozen=True)
class Piece:
    """A token of one of the completions that were asked for."""

    index: int
    """Which completion."""
    event: Event


@dataclass(frozen=True)
class Done:
    """A completion has ended."""

    index: int
    written: Written


@dataclass(frozen=True)
class Failed:
    """Nothing more comes: a request that cannot be done, or a defect of ours."""

    error: Exception


Item = Piece | Done | Failed
T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """What `function` gives, or raises, in a thread that ends with it.

    Whatever computes in parallel leaves helpers behind that belong to its thread. With as many of them as there are
    cores, those of the engine no longer wait awake between two products but fall asleep each time: a third of its
    tokens a second. So nothing but the engine's thread computes in a process that serves, once this has ended.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="opening", daemon=True).start()
    return future.result()


class FullError(Exception):
    """So many completions wait already that no more are taken."""


class StoppedError(Exception):
    """The server stops, or nobody wants the answer any more."""


@dataclass(eq=False)
class Job:
    """Completions that were asked for together. What comes of them is in `items`, in order."""

    requests: Sequence[Request]
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    open: int = 0
    """Completions that have not ended; the event loop's."""
    sequences: dict[int, int] = field(default_factory=dict)
    """Index of each by the engine's number; the thread's."""


class Worker:
    """An engine and its thread. Everything but the thread's own functions is called in the event loop."""

    def __init__(
        self,
        engine: Engine,
        make_engine: Callable[[], Engine],
        *,
        most_open: int,
        observe: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            engine: nobody else's from now on.
            make_engine: makes another after a defect, so that one broken pass does not end all requests to come.
            most_open: completions that may run or wait.
            observe: called after every pass, in the thread, with its seconds.
        """
        self.engine, self._make_engine, self._most_open, self._observe = engine, make_engine, most_open, observe
        self._loop = asyncio.get_running_loop()
        self._inbox: list[Job | Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._jobs: set[Job] = set()
        self._by_sequence: dict[int, Job] = {}
        self.open = 0
        """Completions that run or wait, and calls."""
        self.broken = False
        """Whether the thread has ended, as it could make no other engine after a defect."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Ask for completions; those of one prompt share what was read of it.

        Raises:
            FullError: too many wait.
            StoppedError: the model was closed; the thread would never answer.
        """
        self._check_running()
        if self.open + len(requests) > self._most_open:
            raise FullError
        job = Job(requests, open=len(requests))
        self.open += len(requests)
        self._send(job)
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: what it holds is free after the pass that is running."""
        if job.open:
            self._send(lambda: self._drop(job))

    async def call(self, function: Callable[[], Any]) -> Any:
        """`function`, in the thread, between two passes.

        Raises:
            FullError: too many wait.
            StoppedError: the model was closed.
        """
        self._check_running()
        if self.open >= self._most_open:
            raise FullError
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self.open += 1
        try:
            self._send(run)
            return await asyncio.wrap_future(future)
        finally:
            self.open -= 1

    async def renew(self, change: Callable[[], object]) -> None:
        """`change` the weights, in the thread; what was read before is forgotten. Nothing may run.

        Raises:
            FullError, StoppedError: as `call`.
        """

        def work() -> None:
            change()
            self.engine.forget()

        await self.call(work)

    async def close(self) -> None:
        """End all that is open, and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _check_running(self) -> None:
        if self._closing:
            raise StoppedError("the model was closed")

    def _send(self, message: Job | Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and not self._closing and not self.engine.busy:
                    self._wake.wait()
                messages, self._inbox = self._inbox, []
                closing = self._closing
            for message in messages:
                self._begin(message) if isinstance(message, Job) else message()
            if closing:
                for job in list(self._jobs):
                    self._drop(job)
                return
            if self.engine.busy:
                self._step()

    def _begin(self, job: Job) -> None:
        self._jobs.add(job)
        first: dict[tuple[int, ...], int] = {}
        try:
            for index, request in enumerate(job.requests):
                parent = first.get(request.prompt)
                number = self.engine.submit(request if parent is None else replace(request, parent=parent))
                first.setdefault(request.prompt, number)
                job.sequences[number] = index
                self._by_sequence[number] = job
        except Exception as error:
            self._fail(job, error)

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            events = self.engine.step()
        except Exception as error:
            logger.exception("a pass failed; the requests that ran are ended, and the engine begins anew")
            self._begin_anew(error)
            return
        self._observe(time.perf_counter() - started)
        news: list[tuple[Job, Item]] = []
        for event in events:
            job = self._by_sequence[event.sequence.id]
            news.append((job, Piece(job.sequences[event.sequence.id], event)))
        for written in self.engine.ended:
            if written.id in self._by_sequence:  # else it was cancelled
                job = self._by_sequence.pop(written.id)
                news.append((job, Done(job.sequences.pop(written.id), written)))
                if not job.sequences:
                    self._jobs.discard(job)
        if news:
            self._deliver(news)

    def _begin_anew(self, error: Exception) -> None:
        """After a defect. Nothing more is asked of the engine, which may be in any state."""
        jobs = list(self._jobs)
        self._jobs.clear()
        self._by_sequence.clear()
        for job in jobs:
            job.sequences.clear()
            self._deliver([(job, Failed(error))])
        try:
            self.engine = self._make_engine()
        except Exception:
            logger.exception("no engine can be made; the model is closed, and opened again when it is asked for")
            self._closing = self.broken = True

    def _drop(self, job: Job) -> None:
        self._fail(job, StoppedError("the server stops, or the request was cancelled"))

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, (FinemoeError, StoppedError)):
            logger.error("a request failed: %s", type(error).__name__)
        for number in list(job.sequences):
            self._by_sequence.pop(number, None)
            self.engine.cancel(number)
        job.sequences.clear()
        self._jobs.discard(job)
        self._deliver([(job, Failed(error))])

    def _deliver(self, news: list[tuple[Job, Item]]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, news)

    # ---- the event loop again ---------------------------------------------------------------------------------------

    def _hand_out(self, news: list[tuple[Job, Item]]) -> None:
        for job, item in news:
            ended = {Piece: 0, Done: 1, Failed: job.open}[type(item)]
            job.open -= ended
            self.open -= ended
            job.items.put_nowait(item)
