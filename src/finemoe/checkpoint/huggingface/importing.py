"""From a Hugging Face folder to an imported one: tensor by tensor, checked, resumable, the source untouched."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.huggingface.accounting import Account, our_specs, take_account
from finemoe.checkpoint.huggingface.contradictions import contradictions
from finemoe.checkpoint.huggingface.families import family_of
from finemoe.checkpoint.huggingface.fp8 import Block, block_of, dequantize, factors_of
from finemoe.checkpoint.huggingface.settling import settle_by
from finemoe.checkpoint.kinds import CONFIG
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.memory import check_finite
from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES, TensorFolder, raw_bytes
from finemoe.checkpoint.storage.store import TensorStore
from finemoe.checkpoint.storage.untrusted import TOKENIZER_BYTES, folder_file, parse_json, read_bytes, read_json
from finemoe.checkpoint.storage.workspace import check_apart, check_free, fingerprint, workspace
from finemoe.checkpoint.weights.imported import ImportedWriter, ImportReport
from finemoe.checkpoint.weights.placement import Placement
from finemoe.core.errors import CheckpointError, named
from finemoe.core.logs import logger, mebibytes
from finemoe.model.config import ModelConfig
from finemoe.text.files import COMPANIONS, leads_out, template_problem


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder as others wrote it: tensors under their names, and an account of what becomes of each.

    Understood from config.json and headers alone. `GGUFSource` is the same of a GGUF file.
    """

    path: Path
    family: str
    raw: Mapping[str, Any]
    """config.json."""
    config: ModelConfig
    tensors: TensorFolder
    account: Account
    notes: tuple[str, ...]
    """What a careful reader wants to know."""
    warnings: tuple[str, ...]
    """What everybody must know: where the files contradict each other, and which of them counts."""

    @property
    def block(self) -> Block:
        """Of weights that share an FP8 factor."""
        return block_of(self.raw)

    def values(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A tensor in slices of its rows: as it is stored, and as our model has it, FP8 times its factors.

        Raises:
            CheckpointError: damaged, not a number, or a factor that is none; names the tensor.
        """
        scale_name = self.account.scales.get(name)
        scale = None if scale_name is None else self.tensors.read(scale_name)
        row = 0
        for chunk in self.tensors.chunks(name, multiple=1 if scale is None else self.block[0]):
            value = chunk
            if scale is not None:
                with named(f"{self.path}: {scale_name}"):
                    value = dequantize(chunk, factors_of(scale, row, len(chunk), self.block), block=self.block)
                row += len(chunk)
            check_finite(value, f"{self.path}: {name}")
            yield chunk, value


def open_source(path: Path) -> Source:
    """Understand a Hugging Face folder from config.json and headers, without reading a tensor.

    Raises:
        CheckpointError: whatever is wrong with it.
    """
    if path.is_dir() and not os.path.lexists(path / CONFIG):
        raise CheckpointError(f"{path}: no {CONFIG} in it, so this is no Hugging Face checkpoint")
    raw = read_json(folder_file(path, CONFIG))
    _check_quantization(raw.get("quantization_config"), path)
    with named(path):
        family = family_of(raw)
        family.read(raw)
    tensors = TensorFolder.open(path)
    with named(path):
        tensors, settled = settle_by(family, raw, tensors)
        try:
            account = take_account(tensors, settled.config, family, settled.aside, block_of(raw))
        except CheckpointError as error:
            told = contradictions(raw, settled.config, family.spellings, tensors)
            raise CheckpointError(f"{error}{told}") from error
    notes = (*settled.notes, *tensors.notes)
    warnings = (*tensors.warnings, *settled.warnings, *account.warnings)
    return Source(path, family.name, raw, settled.config, tensors, account, notes, warnings)


def _check_quantization(settings: Any, path: Path) -> None:
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method != "fp8":
        raise CheckpointError(
            f"{path / CONFIG}: quantised by {method!r}; only FP8 with a factor for each block is read, "
            "so get the checkpoint as bf16"
        )


def import_hf(source: str | os.PathLike[str], out: str | os.PathLike[str], *, quiet: bool = False) -> ImportReport:
    """Convert a Hugging Face folder to an imported one.

    The folder `out` appears when all is done. Interrupted, the work lies in `<out>.partial`, and the same call goes on
    with it. Holds at most a slice of one tensor in memory.

    Args:
        source: the folder; never written to.
        out: to make; absent or empty.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: the source is damaged, hostile, or cannot be represented exactly; nothing is left behind.
        RunError: the disk is full or unwritable.
    """
    started = time.monotonic()
    check_apart(source, out)
    place = check_free(Path(out))
    opened = open_source(Path(source))
    with named(opened.path):
        specs, notes = our_specs(opened.config, opened.tensors, opened.account)
    carried = [_spec(opened.tensors, name) for name in opened.tensors.tensors if name in opened.account.carried]
    companions, ignored, left_out = _companions(opened)
    nbytes = sum(spec.nbytes for spec in (*specs, *carried)) + sum(len(data) for data in companions.values())
    mark = fingerprint("import", opened.tensors.files, opened.tensors.headers(), opened.raw)
    count = len(opened.tensors.tensors) + len(specs)
    with workspace(place, mark, nbytes, tensors=count) as folder, ImportedWriter(folder, specs, carried) as writer:
        sums, resumed = _convert(opened, writer, quiet)
        record = {"config": opened.raw, "tensors": _record(opened, sums)}
        about = {"family": opened.family, "format": "huggingface"}
        files = writer.finish(opened.config, about, record, companions, quiet=quiet)
    return ImportReport(
        path=place,
        family=opened.family,
        config=opened.config,
        loaded=len(opened.account.loaded) + len(opened.account.copies),
        dequantized=len(opened.account.scales),
        carried=opened.account.carried,
        nbytes=sum(file.nbytes for file in files),
        resumed=resumed,
        seconds=time.monotonic() - started,
        notes=(*opened.notes, *notes, *ignored),
        warnings=(*opened.warnings, *left_out),
    )


def _spec(tensors: TensorFolder, name: str) -> TensorSpec:
    info = tensors.info(name)
    return TensorSpec(name, info.dtype, info.shape)


def _companions(source: Source) -> tuple[dict[str, bytes], list[str], list[str]]:
    """Tokenizer and generation files, a note on the files that are left behind, and warnings of unreadable ones.

    The weights need none of them, so that none stops an import; a link that leads out of the folder is refused all the
    same.
    """
    files, warnings = {}, []
    present = sorted(os.listdir(source.path))
    for name in COMPANIONS:
        if name in present:
            try:
                files[name] = companion_of(source.path, name)
            except CheckpointError as error:
                if leads_out(source.path, name):
                    raise
                warnings.append(f"{error}; left out: {COMPANIONS[name]}")
                logger.warning("%s", warnings[-1])  # at once: it is easier mended before the weights are copied
    known = {*COMPANIONS, CONFIG, "model.safetensors.index.json"}
    left = [name for name in present if name not in known and not name.endswith(".safetensors") and name[0] != "."]
    return files, [f"not taken along: {', '.join(left)}"] if left else [], warnings


def companion_of(folder: Path, name: str) -> bytes:
    """A tokenizer or generation file, checked as far as its kind goes.

    Raises:
        CheckpointError: it cannot be read, or is not what its name says.
    """
    data = read_bytes(folder_file(folder, name), TOKENIZER_BYTES)
    if name.endswith(".json"):
        parse_json(data, str(folder / name))
    elif (problem := template_problem(data)) is not None:
        raise CheckpointError(f"{folder / name}: it {problem}")
    return data


def _record(source: Source, sums: Mapping[str, str]) -> dict[str, Any]:
    """Status, dtype, shape and checksum of every source tensor."""
    account = source.account
    table: dict[str, Any] = {}
    for name, info in source.tensors.tensors.items():
        status = {"status": "loaded"}
        if name in account.copies:
            status["copy_of"] = account.copies[name]
        elif name in account.carried:
            status = {"status": "carried", "reason": account.carried[name]}
        facts = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "sha256": sums[name]}
        table[name] = {**status, **facts}
    return table


def _convert(source: Source, writer: ImportedWriter, quiet: bool) -> tuple[dict[str, str], int]:
    """Write what is still to be written; the checksum of each source tensor, and how many were done already."""
    sums, resumed = {}, 0
    account, dtypes = source.account, writer.weights.dtypes
    with mebibytes(f"importing {source.path.name}", source.tensors.nbytes, quiet) as advance:
        for name, info in source.tensors.tensors.items():
            placement = account.loaded.get(name)
            if placement is not None:
                facts = writer.weights.facts(placement.ours, placement.index)
                resumed += facts is not None
                facts = facts or _load(source, writer.weights, placement, dtypes[placement.ours])
                sums[name] = facts["sha256"]
            elif name in account.carried and writer.carried is not None:
                facts = writer.carried.facts(name) or _carry(source, writer.carried, name)
                sums[name] = facts["sha256"]
            else:
                sums[name] = source.tensors.sha256(name)
            advance(info.nbytes)
    if resumed:
        logger.info("%d tensors were there from an interrupted import", resumed)
    return sums, resumed


def _carry(source: Source, store: TensorStore, name: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with store.part(name) as part:
        for chunk in source.tensors.chunks(name):
            digest.update(raw_bytes(chunk))
            part.append(chunk)
        part.facts["sha256"] = digest.hexdigest()
    return part.facts


def _load(source: Source, store: TensorStore, placement: Placement, dtype: torch.dtype) -> dict[str, Any]:
    """Copy one tensor to its place, looking at every element on the way."""
    digest = hashlib.sha256()
    with store.part(placement.ours, placement.index) as part:
        for chunk, value in source.values(placement.theirs):
            digest.update(raw_bytes(chunk))
            part.append(value.to(dtype))
        part.facts["sha256"] = digest.hexdigest()
    return part.facts
