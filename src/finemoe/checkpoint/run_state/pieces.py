"""Checkpoints that every process writes its own pieces of, by torch.distributed.checkpoint (DCP).

DCP brings the processes together: it collects what each holds, has what several hold written once, refuses pieces that
overlap or leave gaps, and makes an error of one an error of all. The files are its safetensors (`storage/pieces.py`),
without the pickle that it would keep beside them; folder, checksums and the name that is given last are those of every
checkpoint (`state.py`). No tensor is ever whole here.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from finemoe.checkpoint.run_state.state import (
    METHOD,
    MODEL,
    OPTIMIZER,
    RunState,
    begin,
    give_name,
    is_there,
    keep_last,
    piece_name,
    unnamed,
    write_rest,
)
from finemoe.checkpoint.storage.pieces import Place, said_of
from finemoe.checkpoint.storage.streaming import AbandonedError, Recorded, write_tensors
from finemoe.core.errors import FinemoeError, RunError
from finemoe.core.files import storage_error

_PARTS = (MODEL, OPTIMIZER, METHOD)


def save_pieces(
    checkpoints: Path,
    step: int,
    run: RunState,
    keep: int,
    group: Any,
    *,
    before_naming: Callable[[], object] | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Write the checkpoint of `step` together with all processes of `group`, as `state.save` does alone.

    All of them call this, in the same order if they do so more than once; the first gives the checkpoint its name.

    Args:
        checkpoints: their folder, the same for all.
        step: of the run.
        run: with `places`; must not change meanwhile.
        keep: how many to keep.
        group: of torch.distributed, over the CPU and used for nothing else meanwhile; None: this process is alone.
        before_naming: called when all is on the disk, before the checkpoint gets its name; by the first process.
        stop: set by another thread to give up and leave nothing behind.

    Returns:
        Bytes of the tensors that all of them wrote, on the first; 0 elsewhere.

    Raises:
        RunError: the disk of one of them is full or unwritable; earlier checkpoints are untouched.
        AbandonedError: `stop` was set.
        RuntimeError: a process went away.
    """
    assert run.places is not None  # who calls this has asked for pieces
    writer = _Writer(checkpoints / f"step-{step:08d}", run, keep, before_naming, stop)
    # Copies on several processes are the same; the lowest rank's is what `World.gathered` takes.
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    held = {
        f"{part}/{name}": _Held(tensor, places[name])
        for part, tensors, places in zip(_PARTS, run.tensors, run.places, strict=True)
        for name, tensor in tensors.items()
    }
    try:
        save(held, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        writer.clean()
        raise _plain(error, writer.final, stop, alone=group is None) from error
    except RuntimeError:  # of a collective
        writer.clean()
        raise
    return writer.nbytes


@dataclass(frozen=True)
class _Held:
    """A piece that lies here, as DCP asks for what it is to write."""

    tensor: Tensor
    place: Place

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.place.whole and self.place.whole[0] and not len(self.tensor):
            return []  # more processes than rows
        offsets = torch.Size(self.place.offsets)
        chunk = ChunkStorageMetadata(offsets, self.tensor.size())
        data = TensorWriteData(chunk, TensorProperties(self.tensor.dtype), torch.Size(self.place.whole))
        return [WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)]


@final
class _Writer(StorageWriter):
    """What DCP calls, in this order."""

    def __init__(
        self,
        final: Path,
        run: RunState,
        keep: int,
        before_naming: Callable[[], object] | None,
        stop: threading.Event | None,
    ) -> None:
        self.final = final
        self._run, self._keep, self._before_naming, self._stop = run, keep, before_naming, stop
        self._rank, self._first, self.nbytes = 0, True, 0
        self._fresh = unnamed(final.parent)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Nobody asks: the writer is given."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        """Where this process stands."""
        self._first, self._rank = is_coordinator, kwargs["rank"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first: make the folder and tell the others its name; none where the checkpoint is there already."""
        if is_there(self.final):
            return [replace(plan, storage_data=None) for plan in plans]
        begin(self._fresh)
        return [replace(plan, storage_data=self._fresh.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file of each part with the pieces that are this process's to write."""
        written: list[WriteResult] = []
        if plan.storage_data is not None:
            mine = {item.index.fqn for item in plan.items}
            assert self._run.places is not None
            for part, tensors, places in zip(_PARTS, self._run.tensors, self._run.places, strict=True):
                chosen = {name: tensor for name, tensor in tensors.items() if f"{part}/{name}" in mine}
                if chosen or (self._first and part != METHOD):  # these two are always there
                    folder, here = self.final.parent / plan.storage_data, {name: places[name] for name in chosen}
                    written.append(self._write(folder / piece_name(part, self._rank), chosen, here))
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def _write(self, path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> WriteResult:
        recorded = write_tensors(path, tensors, self._stop, said_of(places), "xb")
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return WriteResult(MetadataIndex(path.name), nbytes, recorded)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first: everything is on the disk, and gets its name."""
        files = {one.index.fqn: one.storage_data for written in results for one in written}
        self.nbytes = sum(one.size_in_bytes for written in results for one in written)
        if files:
            _require_seen(self._fresh, files)
            write_rest(self._fresh, self._run, dict(sorted(files.items())))
            give_name(self._fresh, self.final, self._before_naming)
            keep_last(self.final, self._keep)

    def clean(self) -> None:
        """What was not finished goes."""
        if self._first:
            shutil.rmtree(self._fresh, ignore_errors=True)


def _require_seen(folder: Path, files: Mapping[str, Recorded]) -> None:
    """Check that what all have written lies in this very folder: a machine may have taken its name for another one.

    Raises:
        RunError: a file is missing, or has another size.
    """
    for name, recorded in files.items():
        path = folder / name
        nbytes = path.stat().st_size if path.exists() else None
        if nbytes != recorded.nbytes:
            found = "is not to be seen" if nbytes is None else f"has {nbytes} bytes"
            where = f"{path}: was written with {recorded.nbytes} bytes and {found} where the first process is"
            raise RunError(f"{where}: all machines must see the same files; the run goes on with `finemoe resume`")


def _plain(error: CheckpointException, final: Path, stop: threading.Event | None, *, alone: bool) -> BaseException:
    """What the first of the processes that failed met, in our words and said by one of them."""
    failures = [(rank, failure) for rank, (failure, _) in sorted(error.failures.items())]
    told = [one for one in failures if not isinstance(one[1], AbandonedError)] or failures
    rank, failure = told[0]
    if isinstance(failure, AbandonedError) and (stop is None or not stop.is_set()):
        return RunError(f"{final}: was not written: rank {rank} gave up")
    if isinstance(failure, FileNotFoundError):
        where = f"{final.parent}: the folder that the first process made there is not to be seen"
        failure = RunError(f"{where}: all machines must see the same files; the run goes on with `finemoe resume`")
    if isinstance(failure, OSError):
        failure = storage_error(final, failure)
    if isinstance(failure, FinemoeError) and not alone:
        failure = RunError(f"rank {rank}: {failure}")
        failure.everywhere = True
    return failure
