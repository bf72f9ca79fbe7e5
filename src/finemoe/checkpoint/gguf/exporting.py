"""From an imported folder or a run to a GGUF file that llama.cpp loads: the import's table, read backwards."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor

from finemoe.checkpoint.gguf.codec import FILE_TYPES, KEPT_TYPES, Planned, encode, write_header
from finemoe.checkpoint.gguf.keys import EMBEDDING, OUTPUT, ROPE_FACTORS, Part, Stored, stored_tensors
from finemoe.checkpoint.gguf.metadata import Description, describe
from finemoe.checkpoint.gguf.tokenizer import metadata_of
from finemoe.checkpoint.storage.store import writing
from finemoe.checkpoint.storage.workspace import (
    SMALL_FILES_BYTES,
    check_apart,
    check_free,
    check_space,
    fingerprint,
    workspace,
)
from finemoe.checkpoint.weights.exportable import Exportable, open_exportable
from finemoe.core.config import did_you_mean
from finemoe.core.encodings import in_utf8
from finemoe.core.errors import CheckpointError, DataError, named
from finemoe.core.logs import logger, mebibytes
from finemoe.model.quantised.blocks import Format, dequantise
from finemoe.text.settings import TOKENIZER_CONFIG

ROW_BLOCK = 32
"""Of Q8_0 and Q4_0: rows that are no multiple of it cannot be either, and become F16."""
_QUANTIZATION_VERSION = 2
_HEADER, _JOURNAL = ".header", ".written"
_SYNC_BYTES = 256 << 20  # written between two syncs; after a kill these are written again


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
    dtype: str | None = None,
    tokenizer: bool = True,
    quiet: bool = False,
) -> GGUFReport:
    """Write an imported folder, or the newest checkpoint of a run, as one GGUF file.

    Norms, biases and routers stay F32. What `finemoe quantize` made keeps its blocks to the byte, whatever `dtype` all
    else has. In a Q4_0 file embedding and output matrix are Q8_0, which costs little and
    keeps much. The file appears when it is complete; interrupted, the work lies in `<out>.partial`, and the same call
    goes on with it. Holds at most one tensor in memory; of stacked experts one.

    Args:
        source: imported folder, run directory, or one checkpoint of a run.
        out: the file to make; absent.
        dtype: F32, F16, BF16, Q8_0 or Q4_0. None: F16, and F32 beside blocks that `finemoe quantize` made.
        tokenizer: write it along; False: programs must be given token ids.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: llama.cpp has no such model, or a weight does not fit the type; nothing is left behind.
        DataError: GGUF cannot express the tokenizer.
        RunError: the disk is full or unwritable.
        ConfigError: the `gguf` package is not installed.
    """
    if dtype is not None and dtype not in FILE_TYPES:
        raise CheckpointError(f"dtype {dtype!r} is not written{did_you_mean(dtype, list(FILE_TYPES))}")
    place = _place(source, out)
    return write_gguf(open_exportable(Path(source)), place, dtype, tokenizer=tokenizer, quiet=quiet)


def write_gguf(opened: Exportable, place: Path, dtype: str | None, *, tokenizer: bool, quiet: bool) -> GGUFReport:
    """As `export_gguf`, of what is open already; nothing is at `place`."""
    started = time.monotonic()
    asked, dtype = dtype, dtype or ("F32" if opened.small else "F16")
    with named(opened.path):
        description = describe(opened.config, opened.max_positions)
    metadata, missing = _tokenizer(opened, tokenizer)
    stored = list(stored_tensors(opened.config, description.variants))
    plan, fallbacks = _plan(stored, description, dtype, opened.small)
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": in_utf8(opened.path.resolve().name),
        "general.file_type": KEPT_TYPES[_most(opened.small) or dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **description.values,
        **metadata,
    }
    mark = fingerprint("gguf", opened.tensors.files, opened.tensors.headers(), dtype, list(values), tokenizer)
    with workspace(place, mark, 0, inner=place.name) as folder:
        alignment = write_header(folder / _HEADER, description.architecture, values, plan)
        with mebibytes(f"writing {place.name}", opened.tensors.nbytes, quiet) as advance:
            nbytes = _fill(folder / place.name, opened, stored, plan, description, alignment, advance)
    others = (note for note in opened.notes if not note.startswith(TOKENIZER_CONFIG))
    return GGUFReport(
        path=place,
        architecture=description.architecture,
        kinds=Counter(planned.kind for planned in plan),
        nbytes=nbytes,
        seconds=time.monotonic() - started,
        notes=(*description.notes, *_kept(opened.small, asked), *fallbacks, *missing, *others),
    )


def _most(small: Mapping[str, Format]) -> str | None:
    """The format of most small tensors."""
    return next((kind for kind, _ in Counter(one.name for one in small.values()).most_common(1)), None)


def _kept(small: Mapping[str, Format], asked: str | None) -> list[str]:
    """What is said to somebody who wants another type for what is blocks already."""
    if not small or asked is None:
        return []
    return [f"{len(small)} tensors keep the blocks that `finemoe quantize` made of them; {asked} is for all else"]


def _place(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Where the file will be.

    Raises:
        CheckpointError: it lies in the source, or something is there.
    """
    check_apart(source, out)
    place = check_free(Path(out))
    if place.is_dir():
        raise CheckpointError(f"{place}: is a folder, and a GGUF model is a file; choose another name, or remove it")
    return place


def _tokenizer(opened: Exportable, wanted: bool) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer as metadata, and notes."""
    files = opened.companions if wanted else {}
    try:
        return metadata_of(files, opened.config.vocab_size, str(opened.path), opened.token_ids.get("eos_token_id"))
    except DataError as error:
        hint = "without the tokenizer (--no-tokenizer) the file can be written, and programs must be given token ids"
        raise DataError(f"{error}; {hint}") from error


def _plan(
    stored: list[Stored], description: Description, dtype: str, small: Mapping[str, Format]
) -> tuple[list[Planned], list[str]]:
    """The tensors as they will be stored, and a note on those whose rows do not fit blocks."""
    plan, narrow = [], []
    if description.rope_factors is not None:
        plan.append(Planned(ROPE_FACTORS, tuple(description.rope_factors.shape), "F32"))
    for tensor in stored:
        kind = "F32" if tensor.precise else dtype
        if kind == "Q4_0" and tensor.name in (EMBEDDING, OUTPUT):
            kind = "Q8_0"
        if tensor.source.ours in small:
            kind = small[tensor.source.ours].name
        if kind in ("Q8_0", "Q4_0") and tensor.shape[-1] % ROW_BLOCK:
            narrow.append(tensor.name)
            kind = "F16"
        plan.append(Planned(tensor.name, tensor.shape, kind))
    if not narrow:
        return plan, []
    return plan, [f"{len(narrow)} tensors have rows that are no multiple of {ROW_BLOCK} and are F16: {narrow[0]} ..."]


def _fill(
    path: Path,
    opened: Exportable,
    stored: list[Stored],
    plan: list[Planned],
    description: Description,
    alignment: int,
    advance: Callable[[int], None],
) -> int:
    """Append the tensors to the header, after those that an interrupted export is known to have written; the size."""
    kinds = {planned.name: planned.kind for planned in plan}
    header, journal = path.with_name(_HEADER), path.with_name(_JOURNAL)
    ends = list(_ends(header.stat().st_size, plan, alignment))
    size, own = ends[-1], ends[len(plan) - len(stored) :]
    done, end = _taken_over(path, header, journal, own)
    check_space(path.parent, size + SMALL_FILES_BYTES)
    with writing(path), path.open("r+b") as file, journal.open("a", encoding="ascii") as lines:
        file.truncate(end)
        file.seek(end)
        _pad(file, alignment)
        if description.rope_factors is not None and not done:
            file.write(encode(description.rope_factors[None], "F32", ROPE_FACTORS))
            _pad(file, alignment)
        for number, tensor in enumerate(stored, 1):
            if number > done:
                _write(file, opened, tensor, kinds[tensor.name])
                _pad(file, alignment)
                if file.tell() - end >= _SYNC_BYTES:
                    end = _note(file, lines, number)
            advance(_nbytes(opened, tensor))
        return file.tell()


def _ends(begin: int, plan: list[Planned], alignment: int) -> Iterator[int]:
    """Where each tensor of a file ends, its filling too, after the end of the header."""
    at = begin + -begin % alignment
    yield at
    for planned in plan:
        at += planned.nbytes()
        at += -at % alignment
        yield at


def _taken_over(path: Path, header: Path, journal: Path, ends: list[int]) -> tuple[int, int]:
    """How many tensors an interrupted export has written, and where they end; a file with the header alone else.

    `ends[n]` is where n tensors of the model end: a line of the journal that says otherwise is damaged.
    """
    size = header.stat().st_size
    if path.is_file() and journal.is_file():
        with path.open("rb") as file:
            same = file.read(size) == header.read_bytes()
        noted = journal.read_text(encoding="ascii", errors="replace")
        lines = re.findall(r"^(\d+) (\d+)\n", noted, re.MULTILINE)  # a torn or damaged one counts for nothing
        if same and lines:
            done, end = (int(word) for word in lines[-1])
            if done < len(ends) and end == ends[done] and end <= path.stat().st_size:
                header.unlink()
                logger.info("%d tensors were there from an interrupted export", done)
                return done, end
    journal.unlink(missing_ok=True)
    shutil.copyfile(header, path)
    header.unlink()
    return 0, size


def _note(file: BinaryIO, lines: TextIO, number: int) -> int:
    """Put down that this many tensors are on the disk for good; where they end."""
    file.flush()
    os.fsync(file.fileno())
    lines.write(f"{number} {file.tell()}\n")
    lines.flush()
    return file.tell()


def _write(file: BinaryIO, opened: Exportable, tensor: Stored, kind: str) -> None:
    for part in tensor.parts():
        if part.ours in opened.small:
            blocks = opened.tensors.read(part.ours, part.index)
            if opened.small[part.ours].name == kind:
                file.write(part.blocks_to_theirs(blocks).contiguous().numpy().data)
            else:  # whose rows are no whole blocks
                rows = part.to_theirs(dequantise(blocks, part.shape[-1]))
                file.write(encode(rows, kind, tensor.name))
            continue
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
