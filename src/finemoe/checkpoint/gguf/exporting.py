"""From an imported folder or a run to a GGUF file that llama.cpp loads: the import's table, read backwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finemoe.checkpoint.gguf.codec import FILE_TYPES, Planned, encode, write_header
from finemoe.checkpoint.gguf.keys import EMBEDDING, OUTPUT, ROPE_FACTORS, Part, Stored, stored_tensors
from finemoe.checkpoint.gguf.metadata import Description, describe
from finemoe.checkpoint.gguf.tokenizer import metadata_of
from finemoe.checkpoint.storage.store import writing
from finemoe.checkpoint.weights.exportable import Exportable, open_exportable
from finemoe.core.config import did_you_mean
from finemoe.core.errors import CheckpointError, DataError, RunError, named
from finemoe.core.files import make_folder, sync
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import mebibytes
from finemoe.text.settings import TOKENIZER_CONFIG

_BLOCK = 32  # of Q8_0 and Q4_0
_QUANTIZATION_VERSION = 2
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class GGUFReport:
    """What an export did."""

    path: Path
    architecture: str
    kinds: Mapping[str, int]
    """Tensors of each element type."""
    nbytes: int
    seconds: float
    notes: tuple[str, ...]
    """What the file does not hold, or holds differently."""


def export_gguf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "F16",
    tokenizer: bool = True,
    quiet: bool = False,
) -> GGUFReport:
    """Write an imported folder, or the newest checkpoint of a run, as one GGUF file.

    Norms, biases and routers stay F32. In a Q4_0 file embedding and output matrix are Q8_0, which costs little and
    keeps much. The file appears when it is complete. Holds at most one tensor in memory; of stacked experts one.

    Args:
        source: imported folder, run directory, or one checkpoint of a run.
        out: the file to make; absent.
        dtype: F32, F16, BF16, Q8_0 or Q4_0.
        tokenizer: write it along; False: programs must be given token ids.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: llama.cpp has no such model, or a weight does not fit the type; nothing is left behind.
        DataError: GGUF cannot express the tokenizer.
        RunError: the disk is full or unwritable.
        ConfigError: the `gguf` package is not installed.
    """
    started = time.monotonic()
    if dtype not in FILE_TYPES:
        raise CheckpointError(f"dtype {dtype!r} is not written{did_you_mean(dtype, list(FILE_TYPES))}")
    place = Path(os.path.realpath(out))
    opened = open_exportable(Path(source))
    if place.is_relative_to(os.path.realpath(source)):
        raise CheckpointError(f"{out}: lies in the source, which is never written to; choose another place")
    with named(opened.path):
        description = describe(opened.config, opened.max_positions)
    metadata, missing = _tokenizer(opened, tokenizer)
    stored = list(stored_tensors(opened.config, description.variants))
    plan, fallbacks = _plan(stored, description, dtype)
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": opened.path.resolve().name,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **description.values,
        **metadata,
    }
    with _appearing(place, sum(planned.nbytes() for planned in plan)) as partial:
        alignment = write_header(partial, description.architecture, values, plan)
        with mebibytes(f"writing {place.name}", opened.tensors.nbytes, quiet) as advance:
            nbytes = _fill(partial, opened, stored, plan, description, alignment, advance)
    others = (note for note in opened.notes if not note.startswith(TOKENIZER_CONFIG))
    return GGUFReport(
        path=place,
        architecture=description.architecture,
        kinds=Counter(planned.kind for planned in plan),
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        notes=(*description.notes, *fallbacks, *missing, *others),
    )


def _tokenizer(opened: Exportable, wanted: bool) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer as metadata, and notes."""
    files = opened.companions if wanted else {}
    try:
        return metadata_of(files, opened.config.vocab_size, str(opened.path))
    except DataError as error:
        hint = "without the tokenizer (--no-tokenizer) the file can be written, and programs must be given token ids"
        raise DataError(f"{error}; {hint}") from error


def _plan(stored: list[Stored], description: Description, dtype: str) -> tuple[list[Planned], list[str]]:
    """The tensors as they will be stored, and a note on those whose rows do not fit blocks."""
    plan, narrow = [], []
    if description.rope_factors is not None:
        plan.append(Planned(ROPE_FACTORS, tuple(description.rope_factors.shape), "F32"))
    for tensor in stored:
        kind = "F32" if tensor.precise else dtype
        if kind == "Q4_0" and tensor.name in (EMBEDDING, OUTPUT):
            kind = "Q8_0"
        if kind in ("Q8_0", "Q4_0") and tensor.shape[-1] % _BLOCK:
            narrow.append(tensor.name)
            kind = "F16"
        plan.append(Planned(tensor.name, tensor.shape, kind))
    if not narrow:
        return plan, []
    return plan, [f"{len(narrow)} tensors have rows that are no multiple of {_BLOCK} and are F16: {narrow[0]} ..."]


def _fill(
    path: Path,
    opened: Exportable,
    stored: list[Stored],
    plan: list[Planned],
    description: Description,
    alignment: int,
    advance: Callable[[int], None],
) -> int:
    """Append the tensors to the header; the size of the file."""
    kinds = {planned.name: planned.kind for planned in plan}
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        _pad(file, alignment)
        if description.rope_factors is not None:
            file.write(encode(description.rope_factors[None], "F32", ROPE_FACTORS))
            _pad(file, alignment)
        for tensor in stored:
            _write(file, opened, tensor, kinds[tensor.name])
            _pad(file, alignment)
            advance(_nbytes(opened, tensor))
        return file.tell()


def _write(file: BinaryIO, opened: Exportable, tensor: Stored, kind: str) -> None:
    for part in tensor.parts():
        for piece in _pieces(opened, part):
            file.write(encode(piece, kind, tensor.name))


def _pieces(opened: Exportable, part: Part) -> Iterator[Tensor]:
    """The rows of a part, in slices where their order is ours."""
    if part.turn != "same" or len(part.shape) == 1:
        yield part.to_theirs(opened.tensors.read(part.ours, part.index)).to(torch.float32)
        return
    for chunk in opened.tensors.chunks(part.ours, part.index):
        yield chunk.reshape(-1, part.shape[-1]).to(torch.float32)


def _nbytes(opened: Exportable, tensor: Stored) -> int:
    size = opened.tensors.info(tensor.source.ours).dtype.itemsize
    for length in tensor.shape:
        size *= length
    return size


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


@contextlib.contextmanager
def _appearing(place: Path, nbytes: int) -> Iterator[Path]:
    """A file to fill under another name, which is `place` when the block has ended, and gone when it fails.

    Raises:
        CheckpointError: `place` exists, or the disk is too small.
        RunError: another process writes it, or the disk is full or unwritable.
    """
    if place.exists() or place.is_symlink():
        raise CheckpointError(f"{place}: exists already; choose another name, or remove it")
    partial, lock = (place.with_name(f".{place.name}.{end}") for end in ("partial", "lock"))
    try:
        with writing(place):
            make_folder(place.parent)
            free = shutil.disk_usage(place.parent).free
        if nbytes + _SLACK_BYTES > free:
            needed = nbytes + _SLACK_BYTES
            raise CheckpointError(
                f"{place.parent}: not enough disk: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            )
        with writing(place), exclusive_lock(lock, patience=0):
            try:
                yield partial
                sync(partial)
                partial.rename(place)
                sync(place.parent)
            finally:
                partial.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
    except TimeoutError as error:
        raise RunError(f"{place}: another process is writing it; wait for it, or end it") from error
