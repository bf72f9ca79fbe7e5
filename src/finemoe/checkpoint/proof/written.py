"""Is what was written what was read? Tensor by tensor, from the files of both sides, whatever the writer remembers.

`finemoe import --verify` and `finemoe export --verify` ask it. Both sides are read again from the disk. What was only
moved must be the same bytes; what was converted, the same bytes as a conversion made now.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.gguf import opening as gguf
from finemoe.checkpoint.gguf.codec import decode, encode
from finemoe.checkpoint.gguf.keys import Part
from finemoe.checkpoint.gguf.metadata import as_written
from finemoe.checkpoint.huggingface.accounting import SCALE_SUFFIX, our_dtype
from finemoe.checkpoint.huggingface.fp8 import dequantize, factors_of, quantize
from finemoe.checkpoint.huggingface.importing import Source, open_source
from finemoe.checkpoint.storage.safetensors import Index, TensorFolder, raw_bytes
from finemoe.checkpoint.weights.agreement import SINGLE, differences
from finemoe.checkpoint.weights.exportable import Exportable, open_exportable
from finemoe.checkpoint.weights.imported import Imported, read_imported
from finemoe.core.errors import CheckpointError
from finemoe.core.logs import mebibytes
from finemoe.model.quantised.blocks import dequantise

_Check = tuple[str, int, Callable[[], bool]]
"""Name of a tensor, its bytes, and whether both sides agree on it."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison of all tensors found."""

    tensors: int
    """How many were compared; FP8 factors go with their matrix."""
    different: tuple[str, ...]
    """Names on the foreign side."""

    @property
    def sound(self) -> bool:
        """All agree."""
        return not self.different


def compare_import(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Comparison:
    """Compare an imported folder with the Hugging Face folder or GGUF file that it came from.

    Args:
        source: what was imported.
        out: the imported folder; the checksums in its manifest are compared too.
        metadata: what the import was told that the GGUF file does not say.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: one of them cannot be read, or does not have its recorded checksums.
    """
    source, imported = Path(source), read_imported(Path(out), checksums=True)
    if source.is_file():
        checks = _gguf_imported(gguf.open_gguf(source, metadata=metadata), imported)
    else:
        checks = _hf_imported(open_source(source), imported)
    return _run(list(checks), f"comparing {source.name}", quiet)


def compare_export(source: str | os.PathLike[str], out: str | os.PathLike[str], *, quiet: bool = True) -> Comparison:
    """Compare a Hugging Face folder or GGUF file that was exported with what it came from.

    Args:
        source: imported folder, run or checkpoint.
        out: what was written.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: one of them cannot be read, or lacks tensors.
    """
    opened, out = open_exportable(Path(source)), Path(out)
    checks = _gguf_exported(opened, out) if out.is_file() else _hf_exported(opened, open_source(out))
    return _run(list(checks), f"comparing {out.name}", quiet)


def _run(checks: list[_Check], description: str, quiet: bool) -> Comparison:
    different = []
    with mebibytes(description, sum(nbytes for _, nbytes, _ in checks), quiet) as advance:
        for name, nbytes, agree in checks:
            if not agree():
                different.append(name)
            advance(nbytes)
    return Comparison(len(checks), tuple(different))


def _digest(pieces: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(raw_bytes(piece))
    return digest.hexdigest()


def _hf_imported(source: Source, imported: Imported) -> Iterator[_Check]:
    for name, placement in source.account.loaded.items():

        def agree(name: str = name, ours: str = placement.ours, index: Index = placement.index) -> bool:
            dtype = imported.tensors.info(ours).dtype
            pieces = (piece.to(dtype) for piece in _read_out(source, name))
            return _digest(pieces) == _digest(imported.tensors.chunks(ours, index))

        yield name, source.tensors.info(name).nbytes, agree
    for name, original in source.account.copies.items():
        yield name, source.tensors.info(name).nbytes, _equal(source.tensors, name, original)
    for name in source.account.carried:
        yield name, source.tensors.info(name).nbytes, _same(source.tensors, imported.carried, name)


def _read_out(source: Source, name: str) -> Iterator[Tensor]:
    """A source tensor in pieces, FP8 with its factors."""
    scale_name = source.account.scales.get(name)
    if scale_name is None:
        yield from source.tensors.chunks(name)
        return
    scale, row = source.tensors.read(scale_name), 0
    block = source.block
    for chunk in source.tensors.chunks(name, multiple=block[0]):
        yield dequantize(chunk, factors_of(scale, row, len(chunk), block), our_dtype(chunk.dtype), block)
        row += len(chunk)


def _same(one: TensorFolder, other: TensorFolder, name: str) -> Callable[[], bool]:
    """Bytes, type and shape of a tensor that both must hold."""

    def agree() -> bool:
        if name not in other.tensors:
            return False
        a, b = one.info(name), other.info(name)
        return (a.dtype, a.shape) == (b.dtype, b.shape) and one.sha256(name) == other.sha256(name)

    return agree


def _equal(tensors: TensorFolder, one: str, other: str) -> Callable[[], bool]:
    return lambda: tensors.sha256(one) == tensors.sha256(other)


def _gguf_imported(source: gguf.GGUFSource, imported: Imported) -> Iterator[_Check]:
    for name, stored in source.account.items():

        def agree(name: str = name, parts: tuple[Part, ...] = tuple(stored.parts())) -> bool:
            tensor, row = source.tensors[name], 0
            for part in parts:
                values = decode(tensor.raw(row, part.rows), tensor.kind, tensor.shape[-1])
                mine = imported.tensors.read(part.ours, part.index)
                if not torch.equal(part.to_ours(values).to(mine.dtype), mine):
                    return False
                row += part.rows
            return True

        yield name, source.tensors[name].nbytes, agree


def _hf_exported(opened: Exportable, written: Source) -> Iterator[_Check]:
    lost = differences(opened.config, written.config)
    if lost:
        raise CheckpointError(f"{written.path}: read again, its config.json describes another model: {lost[0]}")
    for name, placement in written.account.loaded.items():

        def agree(name: str = name, ours: str = placement.ours, index: Index = placement.index) -> bool:
            if name in written.account.scales:  # its factors are looked at with it
                return _same_fp8(opened, written, name, ours, index)
            dtype = written.tensors.info(name).dtype
            pieces = (piece.to(dtype) for piece in opened.tensors.chunks(ours, index))
            return _digest(pieces) == _digest(written.tensors.chunks(name))

        yield name, written.tensors.info(name).nbytes, agree
    for name, original in written.account.copies.items():
        yield name, written.tensors.info(name).nbytes, _equal(written.tensors, name, original)
    factors = set(written.account.scales.values())
    for name in written.account.carried:
        if name not in factors and name in opened.carried.tensors:
            yield name, written.tensors.info(name).nbytes, _same(opened.carried, written.tensors, name)


def _same_fp8(opened: Exportable, written: Source, name: str, ours: str, index: Index) -> bool:
    """Whether quantising again, with the factors that were written, gives what was written."""
    factors, row = written.tensors.read(name + SCALE_SUFFIX), 0
    block, stored = written.block, factors.dtype
    settings = written.raw.get("quantization_config") or {}
    for chunk in opened.tensors.chunks(ours, index, multiple=block[0]):
        blocks = factors_of(factors, row, len(chunk), block)
        round_up = settings.get("scale_fmt") == "ue8m0"
        weight, again = quantize(chunk, blocks, power_of_two=round_up, block=block, stored=stored)
        there = written.tensors.read(name, (slice(row, row + len(chunk)),))
        if not torch.equal(again, blocks.float()) or not torch.equal(weight.view(torch.uint8), there.view(torch.uint8)):
            return False
        row += len(chunk)
    return True


def _gguf_exported(opened: Exportable, path: Path) -> Iterator[_Check]:
    written = gguf.open_gguf(path)
    lost = differences(as_written(opened.config, written.variants), written.config, SINGLE)
    if lost:
        raise CheckpointError(f"{path}: read again, its metadata describe another model: {lost[0]}")
    for name, stored in written.account.items():

        def agree(name: str = name, parts: tuple[Part, ...] = tuple(stored.parts())) -> bool:
            tensor, row = written.tensors[name], 0
            for part in parts:
                kept = opened.tensors.read(part.ours, part.index)
                if part.ours in opened.small:
                    if opened.small[part.ours].name == tensor.kind.name:
                        if part.blocks_to_theirs(kept).contiguous().numpy().tobytes() != tensor.raw(row, part.rows):
                            return False
                        row += part.rows
                        continue
                    kept = dequantise(kept, part.shape[-1])
                values = part.to_theirs(kept).to(torch.float32)
                if encode(values, tensor.kind.name, name) != tensor.raw(row, part.rows):
                    return False
                row += part.rows
            return True

        yield name, written.tensors[name].nbytes, agree
