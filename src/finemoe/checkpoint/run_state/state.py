"""Crash-safe checkpoints of a run, and opening the model of one.

A checkpoint is a folder `checkpoints/step-00000100` with `model.safetensors`, `optimizer.safetensors`, `state.json`,
`config.json`, `method.safetensors` where the way of training keeps tensors of its own, and `manifest.json` with size
and SHA-256 of the others. Where each process wrote what it holds (`pieces.py`), there are `model-rank00000.safetensors`
and so on in the place of `model.safetensors`. It is written under another name, synced, and renamed: under its own name
it is always complete. The last few are kept, and a damaged one is passed over. `save` may run in a thread of its own,
on a copy of the state (`snapshot.py`), while training goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finemoe.checkpoint.kinds import CONFIG, MANIFEST, STATE
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.run_state.filed import FiledTensors, unread
from finemoe.checkpoint.storage.memory import empty_tensors, wanted_type
from finemoe.checkpoint.storage.pieces import Place, open_pieces
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.storage.streaming import AbandonedError, Recorded, write_bytes, write_tensors
from finemoe.checkpoint.storage.untrusted import folder_file
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import make_folder, sha256, storage_error, sync
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of, decode_json, read_object, reason_of, require_numbers
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.transformer import Transformer

MODEL, OPTIMIZER, METHOD = "model.safetensors", "optimizer.safetensors", "method.safetensors"
_ANOTHER = "open another checkpoint of the run, or start it again"
_SUFFIX = ".safetensors"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunState:
    """All that a bit-exact resume needs."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    """JSON-able: step, tokens, loader position, random state ..."""
    config: str
    """The run's resolved config.json."""
    method: Mapping[str, Tensor] = field(default_factory=dict)
    """What the way of training keeps besides: a reference model, a mask. Without any, no file is written."""
    places: tuple[Mapping[str, Place], ...] | None = None
    """Part by part, where each of `tensors` lies in its whole, if what is here are a process's pieces."""

    @property
    def tensors(self) -> tuple[Mapping[str, Tensor], ...]:
        """All of them, part by part."""
        return self.model, self.optimizer, self.method


def save(
    checkpoints: Path,
    step: int,
    run: RunState,
    keep: int,
    *,
    before_naming: Callable[[], object] | None = None,
    stop: threading.Event | None = None,
) -> Path:
    """Write the checkpoint of `step` unless it is there, then remove all but the last `keep` up to it.

    Args:
        checkpoints: their folder.
        step: of the run.
        run: must not change meanwhile.
        keep: how many to keep.
        before_naming: called when all is on the disk, before the checkpoint gets its name.
        stop: set by another thread to give up and leave nothing behind.

    Raises:
        RunError: the disk is full or unwritable; earlier checkpoints are untouched.
        AbandonedError: `stop` was set.
    """
    final = checkpoints / f"step-{step:08d}"
    if is_there(final):
        return final
    fresh = unnamed(checkpoints)
    try:
        begin(fresh)
        _write(fresh, run, stop)
        give_name(fresh, final, before_naming)
    except (OSError, RunError, AbandonedError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise storage_error(final, error) from error
        raise
    keep_last(final, keep)
    return final


def is_there(final: Path) -> bool:
    """Whether an earlier process has written it; taking it away first would leave a moment with nothing."""
    return final.exists() and find_damage(final) is None


def unnamed(checkpoints: Path) -> Path:
    """The folder in which this process writes a checkpoint before it has its name."""
    return checkpoints / f".writing-{os.getpid()}"


def begin(fresh: Path) -> None:
    """Make the folder to write in, empty.

    Raises:
        OSError: the system refuses.
    """
    make_folder(fresh.parent)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()


def give_name(fresh: Path, final: Path, before_naming: Callable[[], object] | None) -> None:
    """When all is on the disk: from now on it is a checkpoint.

    Raises:
        OSError: the system refuses.
    """
    if before_naming is not None:
        before_naming()
    if final.exists():  # damaged: this run went on from the one before
        shutil.rmtree(final)
    fresh.rename(final)
    sync(final.parent)


def keep_last(final: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` up to `final`, and what killed processes left."""
    checkpoints = final.parent
    folders = checkpoint_folders(checkpoints)
    here = folders.index(final)
    for old in (*folders[:here], *folders[here + keep :]):  # later steps are damaged: the run began before them
        shutil.rmtree(old)
    for stale in checkpoints.glob(".writing-*"):  # left by a killed process
        shutil.rmtree(stale)


def _write(folder: Path, run: RunState, stop: threading.Event | None) -> None:
    files = {
        MODEL: write_tensors(folder / MODEL, run.model, stop),
        OPTIMIZER: write_tensors(folder / OPTIMIZER, run.optimizer, stop),
    }
    if run.method:
        files[METHOD] = write_tensors(folder / METHOD, run.method, stop)
    write_rest(folder, run, files)


def write_rest(folder: Path, run: RunState, files: Mapping[str, Recorded]) -> None:
    """What is no tensor, and the manifest of it and of the `files` that are written.

    Raises:
        OSError: the system refuses.
    """
    small = {
        STATE: write_bytes(folder / STATE, json.dumps(run.state).encode()),
        CONFIG: write_bytes(folder / CONFIG, run.config.encode()),
    }
    write_bytes(folder / MANIFEST, _manifest({**files, **small}))
    sync(folder)


def piece_name(part: str, rank: int) -> str:
    """The file in which a process keeps its pieces of `part`."""
    return f"{part.removesuffix(_SUFFIX)}-rank{rank:05d}{_SUFFIX}"


def _pieces(folder: Path, part: str) -> list[Path]:
    """Files of processes that hold `part` together; none where it is in one file."""
    return sorted(folder.glob(f"{part.removesuffix(_SUFFIX)}-rank*{_SUFFIX}"))


def open_part(folder: Path, part: str) -> TensorFolder:
    """The tensors of `MODEL`, `OPTIMIZER` or `METHOD` of a checkpoint, read when asked for.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    pieces = _pieces(folder, part)
    if pieces:
        return open_pieces([folder_file(folder, one.name) for one in pieces])
    return TensorFolder.of_files([folder_file(folder, part)])


def read_part(folder: Path, part: str) -> Mapping[str, Tensor]:
    """The same as tensors.

    Raises:
        CheckpointError, OSError, ValueError: a file is missing or damaged.
    """
    return FiledTensors(open_part(folder, part)) if _pieces(folder, part) else load_file(folder / part)


def _manifest(files: Mapping[str, Recorded]) -> bytes:
    entries = {name: {"bytes": file.nbytes, "sha256": file.sha256} for name, file in files.items()}
    return json.dumps({"format": 1, "files": entries}, indent=2).encode()


def load_latest(
    checkpoints: Path,
    share: tuple[int, int] = (0, 1),
    everyone: Callable[[str | None], Sequence[str | None]] = lambda said: [said],
) -> RunState:
    """The newest checkpoint whose checksums hold; a damaged one is named in the log and passed over.

    Args:
        checkpoints: their folder.
        share: of several processes that look at the same folder, the number of this one, and how many they are.
        everyone: what each of them says, of what this one does.

    Raises:
        CheckpointError: there is none.
    """
    folders = checkpoint_folders(checkpoints)
    for folder in folders:
        damage = _any(everyone(find_damage(folder, share)))
        if damage is None:
            loaded, own = _loaded(folder)
            damage = _any(everyone(own))
            if loaded is not None and damage is None:
                return loaded
        logger.warning("%s is damaged (%s): trying the one before", folder, damage)
    found = f"all {len(folders)} are damaged" if folders else "there is none"
    raise CheckpointError(f"{checkpoints}: no checkpoint to open, {found}; start the run again")


def _any(said: Sequence[str | None]) -> str | None:
    return next((one for one in said if one is not None), None)


def _loaded(folder: Path) -> tuple[RunState | None, str | None]:
    """A checkpoint, or what is wrong: it was written damaged, or with a manifest that fits the damage."""
    try:
        return _load(folder), None
    except CheckpointError as error:
        return None, str(error)


def _load(folder: Path) -> RunState:
    """What a checkpoint whose checksums hold keeps.

    Raises:
        CheckpointError: it cannot be read all the same.
    """
    parts: dict[str, Mapping[str, Tensor]] = {}
    for name in (MODEL, OPTIMIZER, METHOD):
        with damage_of(folder / name, _ANOTHER, CheckpointError):
            parts[name] = read_part(folder, name) if name != METHOD or _files(folder, name) else {}
    state = read_object(folder / STATE, _ANOTHER, CheckpointError)
    with damage_of(folder / STATE, _ANOTHER, CheckpointError):
        require_numbers(state, ("step", "tokens", "position", "seconds", "threads"))
    with damage_of(folder / CONFIG, _ANOTHER, CheckpointError):
        config = (folder / CONFIG).read_text(encoding="utf-8")
    return RunState(parts[MODEL], parts[OPTIMIZER], state, config, parts[METHOD])


def find_damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder; None when every size and checksum holds.

    `share`: the number of this process and how many look, of which each compares the checksums of some files.
    """
    try:
        manifest = decode_json((folder / MANIFEST).read_bytes())
        tensors = [name for part in (MODEL, OPTIMIZER, METHOD) for name in _files(folder, part)]
        mine, looking = share
        for number, name in enumerate(dict.fromkeys((*manifest["files"], *tensors, STATE, CONFIG))):
            path, entry = folder / name, manifest["files"][name]
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if number % looking == mine and sha256(path) != entry["sha256"]:
                return f"{name} does not have its recorded checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {reason_of(error)}"
    return None


def _files(folder: Path, part: str) -> list[str]:
    """That `part` lies in, or should."""
    pieces = [one.name for one in _pieces(folder, part)]
    return pieces or ([part] if part != METHOD or (folder / part).exists() else [])


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not checkpoints.is_dir():
        return []
    found = {int(match[1]): path for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def newest_checkpoint(path: Path) -> Path:
    """The newest undamaged checkpoint of a run directory, or `path` itself when it is one; the log names damaged ones.

    Raises:
        CheckpointError: not a run, or nothing undamaged.
    """
    own = (path / MANIFEST).exists() or (path / STATE).exists()
    folders = [path] if own else checkpoint_folders(path / "checkpoints")
    if not folders:
        raise CheckpointError(f"{path}: neither an imported folder nor a run with a checkpoint (no checkpoints/step-*)")
    for folder in folders:
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s is damaged (%s)", folder, damage)
    raise CheckpointError(f"{path}: every checkpoint is damaged")


def load_model(
    path: str | os.PathLike[str], kernels: Kernels | None = None, *, dtype: torch.dtype | None = None
) -> Transformer:
    """The model of a run directory (its newest undamaged checkpoint), or of one checkpoint folder, in eval mode.

    `dtype` of the weights; None: float32, as they are stored. Routers are float32 all the same.

    Raises:
        CheckpointError: not a run, nothing undamaged, or weights that do not fit the configuration.
    """
    folder = newest_checkpoint(Path(path))
    raw = read_object(folder / CONFIG, _ANOTHER, CheckpointError)
    with torch.device("meta"):
        model = Transformer(model_of(raw, folder / CONFIG), kernels)
    with damage_of(folder / MODEL, _ANOTHER, CheckpointError):
        tensors = unread(read_part(folder, MODEL))
    types = {name: wanted_type(name, tensor.dtype, dtype) for name, tensor in model.state_dict().items()}
    copies = empty_tensors({name: (tensor.shape, types.get(name, tensor.dtype)) for name, tensor in tensors.items()})
    for name, copy in copies.items():
        copy.copy_(tensors[name][...])
    load_weights(model, copies, str(folder), assign=True)
    return model.eval()


def open_weights(path: Path) -> tuple[ModelConfig, TensorFolder]:
    """The model of the newest undamaged checkpoint by its header: tensors are read, and not mapped, one at a time.

    Raises:
        CheckpointError: as `load_model`.
    """
    folder = newest_checkpoint(path)
    config = model_of(read_object(folder / CONFIG, _ANOTHER, CheckpointError), folder / CONFIG)
    return config, open_part(folder, MODEL)


def load_weights(model: Transformer, tensors: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Fill `model`; every tensor is used and none is missing. With `assign` they become the model's own.

    Raises:
        CheckpointError: naming the keys or shapes that do not fit.
    """
    try:
        model.load_state_dict(dict(tensors), strict=True, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: the weights do not fit the configuration: {error}") from error
