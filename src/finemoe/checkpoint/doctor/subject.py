"""What lies at a path, opened as far as its damage allows: configuration, tensors by name, and where each belongs.

Everything that fails on the way becomes a finding, and the rest of the examination goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.doctor.files import check_manifest
from finemoe.checkpoint.doctor.findings import Findings, few
from finemoe.checkpoint.gguf import opening as gguf
from finemoe.checkpoint.gguf.codec import decode
from finemoe.checkpoint.gguf.keys import stored_tensors
from finemoe.checkpoint.huggingface import keys as hf_keys
from finemoe.checkpoint.huggingface.accounting import check_count, split_copies
from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.huggingface.settling import settle_by
from finemoe.checkpoint.kinds import CONFIG, JOURNAL, MANIFEST, SOURCE, Kind, likely_kind, require_there, several_models
from finemoe.checkpoint.own_config import model_of
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES, TensorFolder
from finemoe.checkpoint.storage.untrusted import folder_file, read_json
from finemoe.checkpoint.weights.imported import CARRIED
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.core.errors import FinemoeError
from finemoe.model.config import ModelConfig
from finemoe.model.quantised.blocks import FORMATS

_OWN_JSON_BYTES = 256 << 20
_ROWS_BYTES = 64 << 20
_BLOCK_BYTES = {one.bytes for one in FORMATS.values()}


@dataclass(frozen=True)
class Held:
    """One tensor that a file holds."""

    name: str
    dtype: str
    """As the file's format names it."""
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[Tensor]]
    """Its values, in pieces along the first dimension."""

    @property
    def floating(self) -> bool:
        """Whether it can hold NaN; so can what a quantised GGUF tensor is decoded to."""
        return self.dtype not in _WHOLE


_WHOLE = frozenset(DTYPE_NAMES[d] for d in DTYPE_NAMES if not (d.is_floating_point or d.is_complex))


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs in our model."""

    ours: str
    shape: tuple[int, ...]
    """That the file must give it."""
    optional: bool = False
    """Holds again what another one holds, and may be missing."""


@dataclass
class Subject:
    """A checkpoint of any kind, opened as far as its damage allows: any part of it may be missing.

    Filled step by step; whatever fails on the way is a finding.
    """

    path: Path
    kind: Kind
    home: Path
    """Folder with tokenizer and template; a GGUF file itself."""
    family: str | None = None
    config: ModelConfig | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The foreign config.json, or GGUF's metadata."""
    held: dict[str, Held] = field(default_factory=dict)
    carried: dict[str, Held] = field(default_factory=dict)
    """Of an imported folder: source tensors kept verbatim."""
    places: dict[str, Place] | None = None
    """By name in the file; None where the configuration is not understood."""
    spare: Mapping[str, str] = field(default_factory=dict)
    """Tensors that no part of the model needs -> why."""
    source_status: dict[str, list[str]] = field(default_factory=dict)
    """Of an imported folder: names of source tensors by what became of them."""
    whole: bool = True
    """False where some of the files could not be read, so that missing tensors say nothing."""
    checkpoints: tuple[str, ...] = ()
    """Of a run, newest first."""

    def blocks(self) -> set[str]:
        """Names of what was made small: tensors of ours that are blocks of few bits."""
        if self.kind != "imported":
            return set()
        small = {name: held.shape for name, held in self.held.items() if held.dtype == DTYPE_NAMES[torch.uint8]}
        return {name for name, shape in small.items() if may_be_small(name) and shape and shape[-1] in _BLOCK_BYTES}


def open_subject(path: Path, found: Findings, *, deep: bool, quiet: bool) -> Subject:
    """Open what lies at `path`; `deep` compares checksums where there are any.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    require_there(path)
    subject = Subject(path, likely_kind(path), path)
    opener = _OPENERS[subject.kind]
    with found.guard("files"):
        opener(subject, found, deep, quiet)
    return subject


def _open_unknown(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    path = subject.path
    if path.is_file():
        found.problem("files", f"{path}: not opened: only .gguf and .safetensors files are")
        return
    if path.name.endswith(".partial") or (path / JOURNAL).exists():
        out = str(path).removesuffix(".partial")
        found.problem("files", f"an interrupted import, export or the like; give its command again to finish {out}")
        return
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        found.problem("files", f"a folder of GGUF files; give one of them: {path / ggufs[0]}")
        return
    what = (
        several_models(path)
        or "neither a run, nor an imported folder, nor a Hugging Face folder (no config.json, no .safetensors)"
    )
    found.problem("files", f"{path}: {what}")


def _open_huggingface(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    path = subject.path
    with found.guard("config"):
        subject.raw = read_json(folder_file(path, CONFIG))
        family = family_of(subject.raw)
        subject.family = family.name
        understood = family.read(subject.raw)
        subject.config = understood.config
        for text in understood.notes:
            found.note("config", text)
        for text in understood.warnings:
            found.warning("config", text)
    tensors = _tensors(path, subject, found)
    if subject.config is not None and subject.family is not None:
        names = tensors.tensors.keys()
        with found.guard("config"):
            if subject.whole:
                tensors, settled = settle_by(family, subject.raw, tensors)
                subject.config, subject.held, names = settled.config, held_of(tensors), tensors.tensors.keys()
                for text in (*tensors.warnings, *settled.warnings):
                    if text not in understood.warnings:  # told already
                        found.warning("weights", text)
                subject.spare = dict(settled.aside)
                check_count(subject.config, len(names))
            loaded, again, _ = split_copies(family.placements(subject.config))
            subject.places = {name: Place(p.ours, p.shape) for name, p in loaded.items()}
            subject.places |= {name: Place(p.ours, p.shape, True) for name, p in again.items()}
            for name in names - subject.places.keys():
                reason = "holds no element" if 0 in subject.held[name].shape else hf_keys.ignorable(name)
                if reason is not None:
                    subject.spare = {**subject.spare, name: reason}


def _tensors(path: Path, subject: Subject, found: Findings) -> TensorFolder:
    """The tensors of a folder; where one file is damaged those of the others."""
    try:
        tensors = TensorFolder.open(path)
    except FinemoeError as error:
        found.problem("files", str(error))
        subject.whole = False
        tensors = _sound_files(path, found)
    for note in tensors.notes:
        if "pickle" not in note:  # `check_folder` names them, whatever else lies there
            found.note("files", note)
    subject.held = held_of(tensors)
    return tensors


def _sound_files(path: Path, found: Findings) -> TensorFolder:
    sound, damaged = [], []
    for file in sorted(path.glob("*.safetensors")):
        if file.name == f"{CARRIED}.safetensors":
            continue
        try:
            TensorFolder.of_files([folder_file(path, file.name)])
        except FinemoeError as error:
            damaged.append(str(error))
        else:
            sound.append(file)
    for text in damaged[:3]:
        found.problem("files", text)
    if len(damaged) > 3:
        found.problem("files", f"{len(damaged) - 3} more .safetensors files are damaged too")
    try:
        return TensorFolder.of_files(sound)
    except FinemoeError as error:  # a name in two of them
        found.problem("files", str(error))
        return TensorFolder({})


def held_of(tensors: TensorFolder) -> dict[str, Held]:
    """The tensors of safetensors files."""

    def reader(name: str) -> Callable[[], Iterator[Tensor]]:
        return lambda: tensors.chunks(name)

    return {
        name: Held(name, DTYPE_NAMES[info.dtype], info.shape, info.nbytes, reader(name))
        for name, info in tensors.tensors.items()
    }


def _open_imported(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    path = subject.path
    if not (path / MANIFEST).exists():
        found.problem("files", f"no {MANIFEST}, so the import was not finished, or a file is lost; import again")
    else:
        with found.guard("files"):
            check_manifest(path, found, deep=deep, quiet=quiet)
    with found.guard("config"):
        _read_own_config(subject, path / CONFIG)
    with found.guard("config"):
        record = read_json(folder_file(path, SOURCE), _OWN_JSON_BYTES)
        subject.raw = record["config"] if isinstance(record.get("config"), dict) else {}
        tensors = record.get("tensors")
        for name, entry in tensors.items() if isinstance(tensors, dict) else ():
            status = entry.get("status") if isinstance(entry, dict) else None
            subject.source_status.setdefault(str(status), []).append(name)
    _tensors(path, subject, found)
    if (path / f"{CARRIED}.safetensors").exists():
        with found.guard("files"):
            subject.carried = held_of(TensorFolder.of_files([folder_file(path, f"{CARRIED}.safetensors")]))
    _expect_own(subject, found)


def _read_own_config(subject: Subject, file: Path) -> None:
    raw = read_json(folder_file(file.parent, file.name))
    source = raw.get("source")
    if isinstance(source, dict) and isinstance(source.get("family"), str):
        subject.family = source["family"]
    subject.config = model_of(raw, file)


def _expect_own(subject: Subject, found: Findings) -> None:
    if subject.config is not None:
        with found.guard("config"):
            subject.places = {name: Place(name, shape) for name, shape in model_shapes(subject.config).items()}


def _open_run(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    """The newest checkpoint that seems whole; the damaged ones are named."""
    folders = run_state.checkpoint_folders(subject.path / "checkpoints")
    subject.checkpoints = tuple(folder.name for folder in folders)
    damaged: list[str] = []
    for folder in folders:
        tried = Findings()
        with tried.guard("files"):
            check_manifest(folder, tried, deep=deep, quiet=quiet)
        if not tried.sorted():
            break
        damaged.append(folder.name)
        found.problem("files", f"checkpoint {folder.name}: {tried.sorted()[0].text}")
    else:
        said = f"all are damaged: {few(damaged)}" if damaged else "there is none yet; `finemoe resume` goes on"
        found.problem("files", f"no checkpoint to open: {said}")
        with found.guard("config"):
            _read_own_config(subject, subject.path / CONFIG)
        return
    _open_checkpoint_at(subject, found, folder)


def _open_checkpoint(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    if not (subject.path / "tokenizer.json").exists():
        subject.home = subject.path.absolute().parent.parent
    with found.guard("files"):
        check_manifest(subject.path, found, deep=deep, quiet=quiet)
    _open_checkpoint_at(subject, found, subject.path)


def _open_checkpoint_at(subject: Subject, found: Findings, folder: Path) -> None:
    with found.guard("config"):
        _read_own_config(subject, folder / CONFIG)
    with found.guard("files"):
        subject.held = held_of(run_state.open_part(folder, run_state.MODEL))
    subject.whole = bool(subject.held)
    _expect_own(subject, found)


def _open_tensors(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    path = subject.path
    subject.held = held_of(TensorFolder.of_files([path]))
    found.note("files", "a file alone: without its config.json nobody can say what is missing; give its folder")
    subject.home = path.parent


def _open_gguf(subject: Subject, found: Findings, deep: bool, quiet: bool) -> None:
    opened = gguf.open_gguf(subject.path)
    subject.raw = {key: value for key, value in opened.metadata.items() if not isinstance(value, list)}
    subject.family = opened.architecture or None

    def reader(name: str) -> Callable[[], Iterator[Tensor]]:
        tensor = opened.tensors[name]
        width = tensor.shape[-1]
        step = max(1, _ROWS_BYTES // tensor.kind.row_bytes(width))
        starts = range(0, tensor.rows, step)
        return lambda: (decode(tensor.raw(at, min(step, tensor.rows - at)), tensor.kind, width) for at in starts)

    subject.held = {
        name: Held(name, tensor.kind.name, tensor.shape, tensor.nbytes, reader(name))
        for name, tensor in opened.tensors.items()
    }
    with found.guard("config"):
        subject.config = opened.config
        subject.spare = opened.dropped
        for text in opened.warnings:
            found.warning("config", text)
        stored = stored_tensors(opened.config, opened.variants)
        subject.places = {entry.name: Place(entry.source.ours, entry.shape) for entry in stored}


_OPENERS: Mapping[Kind, Callable[[Subject, Findings, bool, bool], None]] = {
    "run": _open_run,
    "checkpoint": _open_checkpoint,
    "imported": _open_imported,
    "huggingface": _open_huggingface,
    "gguf": _open_gguf,
    "tensors": _open_tensors,
    "unknown": _open_unknown,
}
