"""Checkpoints of a run: copied at a step's end, written by a thread while training goes on, all there at the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor

from finemoe.checkpoint.run_state.filed import Filed, FiledTensors, unread
from finemoe.checkpoint.run_state.snapshot import NoRoomError, Snapshot
from finemoe.checkpoint.run_state.state import RunState, load_weights, save
from finemoe.checkpoint.storage.pieces import Place
from finemoe.checkpoint.storage.streaming import AbandonedError
from finemoe.core.config import to_json
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of
from finemoe.parallel.seat import seat
from finemoe.parallel.world import SOLO, World
from finemoe.runs.config import RunConfig
from finemoe.runs.observers import Log
from finemoe.training.method import Saved
from finemoe.training.optimizers import load_optimizer_tensors, optimizer_tensors
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer, TrainState


@dataclass
class _Writing:
    """A checkpoint that the thread writes."""

    step: int
    stall: float
    """Seconds that training has stood still for it."""
    written: Future[tuple[float, int]]
    """Seconds that it took, and bytes."""


@final
class Save:
    """A checkpoint every so many steps, every so many minutes, and after the last step; one at a time, in a thread.

    An observer, and a context manager around the run: what the thread could not write is an error at the next step, at
    the next checkpoint or at the exit, whichever comes first.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        log: Log | None,
        world: World = SOLO,
        saved: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Save into `directory`; `clock` gives seconds, and tests give their own.

        `saved` is the step of the checkpoint that the run goes on from: that one is there, and was found whole.

        Of several processes the first has the log. It writes alone, and the others give it what lies with them; or, if
        the configuration says "sharded", all write at once, and meet in a group of their own.
        """
        self._world = world
        self._sharded = config.training.checkpoint_format == "sharded"
        self._group = world.apart() if self._sharded else None
        self._writes = log is not None or self._sharded
        self._config = config
        self._clock = clock
        self._begun = clock()
        self._checkpoints = directory / "checkpoints"
        self._log = log
        self._stop = threading.Event()
        here = seat() if self._sharded and world.size > 1 else None
        self._snapshot = Snapshot(1 if here is None else here.local_processes)
        self._writing: _Writing | None = None
        self._saved = saved
        self._room = True

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save when it is time.

        Raises:
            RunError: the disk is full or unwritable, now or since the last checkpoint was begun.
        """
        if self._writing is not None and self._is_written(self._writing):
            self._finish()
        if trainer.done:
            self.save(trainer)
        elif trainer.world.any(self._is_time(report.step)):
            self._save_behind(trainer)

    def _is_written(self, writing: _Writing) -> bool:
        """Where all write, by all of them: what failed is then an error of the same step everywhere."""
        done = writing.written.done()
        return not self._world.any(not done) if self._sharded else done

    def _is_time(self, step: int) -> bool:
        """By the count of steps, or by the clock since the last checkpoint was begun."""
        training = self._config.training
        waited = self._clock() - self._begun
        late = training.checkpoint_minutes > 0 and waited >= 60 * training.checkpoint_minutes
        return late or step % training.steps_between_checkpoints == 0

    def save(self, trainer: Trainer) -> None:
        """Save now; the checkpoint is there when this returns.

        Raises:
            RunError: the disk is full or unwritable.
        """
        started = time.perf_counter()
        self._finish()
        if self._saved == trainer.state.step:
            return
        self._begun = self._clock()
        state = state_of(trainer, self._config)
        if not self._writes:
            self._saved = trainer.state.step
            return
        seconds, nbytes = self._write(trainer.state.step, state)
        self._note(trainer.state.step, nbytes, time.perf_counter() - started, seconds, behind=False)

    def wait(self) -> None:
        """Wait until what the thread is writing is there.

        Raises:
            RunError: the disk is full or unwritable.
        """
        self._finish()

    def close(self) -> None:
        """Nothing yet: a run that failed is still saved after its last step."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the thread; a second Ctrl-C, or anything else that is no error, makes it give up.

        Where all write and a meeting failed, one of them may never write: after `parallel.timeout` it is left alone.

        Raises:
            RunError: the disk is full or unwritable, and nothing worse ended the run.
        """
        if kind is not None and not issubclass(kind, Exception):
            self._stop.set()
        lost = self._sharded and isinstance(error, RuntimeError)
        try:
            self._finish(self._config.parallel.timeout if lost else None)
        except AbandonedError:
            pass
        except TimeoutError:
            logger.error("the last checkpoint was given up: not all processes have written their pieces of it")
        except (RunError, RuntimeError) as late:  # of our own, or of a process that went away
            if error is None:
                raise
            logger.error("%s", late)

    def _save_behind(self, trainer: Trainer) -> None:
        self._finish()
        self._begun = self._clock()
        started = time.perf_counter()
        state = state_of(trainer, self._config)
        if not self._writes:
            self._saved = trainer.state.step
            return
        gathered = self._world.size > 1 and not self._sharded
        copy = state if gathered else self._copied(state)  # what was gathered is a copy
        if copy is None:
            self.save(trainer)
            return
        step = trainer.state.step
        future = _in_a_thread(lambda: self._write(step, copy))
        self._writing = _Writing(step, time.perf_counter() - started, future)

    def _copied(self, state: RunState) -> RunState | None:
        """None where there is no room for a copy; where all write, with any of them, so that all do the same."""
        full = False
        try:
            self._snapshot.make_room(state)
        except NoRoomError as error:
            if self._room:
                logger.warning("training stands still while checkpoints are written: a copy of one takes %s", error)
            full, self._room = True, False
        if self._world.any(full) if self._sharded else full:
            self._snapshot.leave()
            return None
        return self._snapshot.take(state)

    def _finish(self, patience: float | None = None) -> None:
        """Wait for the thread, and note what it did or raise what it raised; `patience`: [seconds] at most."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        started = time.perf_counter()
        seconds, nbytes = writing.written.result(patience)
        stall = writing.stall + time.perf_counter() - started
        self._note(writing.step, nbytes, stall, seconds, behind=True)

    def _write(self, step: int, state: RunState) -> tuple[float, int]:
        """Write a checkpoint, whatever thread this is; seconds and bytes."""
        started = time.perf_counter()
        keep = self._config.training.keep_checkpoints
        # A checkpoint must not outlive the metrics of its steps.
        sync = None if self._log is None else self._log.sync
        if self._sharded:
            from finemoe.checkpoint.run_state.pieces import save_pieces  # torch.distributed takes a second to load

            nbytes = save_pieces(self._checkpoints, step, state, keep, self._group, before_naming=sync, stop=self._stop)
        else:
            nbytes = sum(tensor.nbytes for tensors in state.tensors for tensor in tensors.values())
            save(self._checkpoints, step, state, keep, before_naming=sync, stop=self._stop)
        return time.perf_counter() - started, nbytes

    def _note(self, step: int, nbytes: int, stall: float, seconds: float, *, behind: bool) -> None:
        self._saved = step
        if self._log is None:
            return
        record = {"kind": "checkpoint", "step": step, "bytes": nbytes, "in_background": behind}
        self._log.keep({**record, "stall_seconds": round(stall, 4), "write_seconds": round(seconds, 4)})


def _in_a_thread(work: Callable[[], tuple[float, int]]) -> Future[tuple[float, int]]:
    """What `work` gives or raises, later. The end of the program does not wait for it: `Save` does."""
    future: Future[tuple[float, int]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def state_of(trainer: Trainer, config: RunConfig) -> RunState:
    """All that a bit-exact resume needs.

    Gathered on the first process; alone, and where the configuration says "sharded", the tensors are the trainer's own
    and change with its next step.
    """
    state, world = trainer.state, trainer.world
    parts = {name: part.state() for name, part in trainer.method.state.items()}
    held: tuple[dict[str, Tensor], ...] = (
        trainer.model.state_dict(),
        optimizer_tensors(trainer.optimizers, trainer.parameters),
        {f"{name}/{key}": one for name, part in parts.items() for key, one in part.tensors.items()},
    )
    sharded = config.training.checkpoint_format == "sharded"
    model, optimizer, method = map(_local(world) if sharded else world.gathered, held)
    return RunState(
        model=model,
        optimizer=optimizer,
        method=method,
        places=tuple(map(_places(world), held)) if sharded else None,
        state={
            "step": state.step,
            "tokens": state.tokens,
            "position": state.position,
            "seconds": state.seconds,
            "skipped": state.skipped,
            "rng": {device: bytes(one.tolist()).hex() for device, one in state.rng.items()},
            "threads": torch.get_num_threads(),
            "kernels": trainer.model.kernels.model_dump(include={"experts", "products"}),
            # a copy, since the thread writes it while training goes on; what is not JSON is found here
            "method": json.loads(json.dumps({name: dict(part.values) for name, part in parts.items()})),
        },
        config=to_json(config),
    )


def _local(world: World) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {name: world.local(one.detach()) for name, one in held.items()}


def _places(world: World) -> Callable[[Mapping[str, Tensor]], dict[str, Place]]:
    return lambda held: {name: Place(world.first_row(one), tuple(one.shape)) for name, one in held.items()}


def restore(trainer: Trainer, saved: RunState, source: Path) -> None:
    """Put the trainer where `state_of` found it.

    Raises:
        CheckpointError: the weights are of another model, other parameters were trained, or the method kept another
            state; names `source`.
    """
    if trainer.world.size == 1 and not isinstance(saved.model, FiledTensors):
        load_weights(trainer.model, saved.model, str(source))
    else:
        _put_weights(trainer, unread(saved.model), source)
    moments = dict(unread(saved.optimizer))
    if trainer.world.stages > 1:  # those of other stages are theirs
        elsewhere = {name for names in trainer.world.everyone(list(trainer.parameters)) for name in names}
        elsewhere -= set(trainer.parameters)
        moments = {key: one for key, one in moments.items() if key.rpartition("/")[0] not in elsewhere}
    try:
        load_optimizer_tensors(trainer.optimizers, trainer.parameters, moments, trainer.world.put)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}; put back what was trained when the run began") from error
    state = dict(saved.state)
    _restore_method(trainer, saved.method, state.pop("method", {}), source)
    with damage_of(f"{source}: state.json of the newest checkpoint", "remove that checkpoint", CheckpointError):
        rng = _generators(state.pop("rng"))
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
        threads = state.pop("threads")
        if trainer.world.size == 1:  # several share the cores of a machine by how many they are
            torch.set_num_threads(threads)  # sums are cut by thread: another number rounds differently
        state.pop("kernels", None)  # the model was built with them
        trainer.state = TrainState(**state, rng=rng)


def _put_weights(trainer: Trainer, tensors: Mapping[str, Tensor | Filed], source: Path) -> None:
    """Into each process what lies there; every tensor is used and none is missing."""
    own = trainer.model.state_dict()
    everywhere = {name for names in trainer.world.everyone(list(own)) for name in names}
    if everywhere != tensors.keys():
        apart = sorted(everywhere ^ tensors.keys())
        raise CheckpointError(f"{source}: the weights do not fit the configuration: {apart[:4]} are on one side only")
    for name, tensor in own.items():
        try:
            trainer.world.put(tensor, tensors[name])
        except ValueError as error:
            raise CheckpointError(f"{source}: the weights do not fit the configuration: {name}: {error}") from error


def _restore_method(trainer: Trainer, tensors: Mapping[str, Tensor], values: Mapping[str, Any], source: Path) -> None:
    """Give every part of the method what it had saved; every tensor is used."""
    parts = trainer.method.state
    known = set(values) | {key.partition("/")[0] for key in tensors}
    if known != set(parts):
        raise CheckpointError(
            f"{source}: the checkpoint holds state of {sorted(known)}, and the method of config.json keeps that of "
            f"{sorted(parts)}: they are not of the same run"
        )
    for name, part in parts.items():
        own = {key.removeprefix(f"{name}/"): one for key, one in tensors.items() if key.startswith(f"{name}/")}
        part.restore(Saved(own, values[name]))


def _generators(saved: Mapping[str, str] | str) -> dict[str, Tensor]:
    """States of default generators by kind of device; runs of version 0.1.0 kept that of the CPU alone."""
    by_device = {"cpu": saved} if isinstance(saved, str) else saved
    return {device: torch.tensor(list(bytes.fromhex(one)), dtype=torch.uint8) for device, one in by_device.items()}
