"""GGUF files: opened by their headers, loaded, and imported tensor by tensor.

One rule for element types: F32, F16 and BF16 stay what they are, and everything quantised becomes F32, so that logits
are those of the file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from finemoe.checkpoint.gguf.codec import PLAIN, decode
from finemoe.checkpoint.gguf.config import Facts, read_model
from finemoe.checkpoint.gguf.file import GGUFFile, StoredTensor, read_header
from finemoe.checkpoint.gguf.keys import EMBEDDING, ROPE_FACTORS, Stored, Variants, stored_tensors
from finemoe.checkpoint.gguf.keys import Part as Placed
from finemoe.checkpoint.gguf.tokenizer import LISTS, companions_of, has_tokenizer, template_of, tokenizer_of
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.memory import check_finite, mapped
from finemoe.checkpoint.storage.safetensors import TensorInfo
from finemoe.checkpoint.storage.workspace import check_apart, check_free, fingerprint, workspace
from finemoe.checkpoint.weights.build import Part, build
from finemoe.checkpoint.weights.imported import ImportedWriter, ImportReport
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import may_be_small
from finemoe.core.errors import CheckpointError
from finemoe.core.logs import logger, mebibytes
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.quantised.blocks import FORMATS, Format, all_finite
from finemoe.model.transformer import Transformer
from finemoe.text.chat import ChatTemplate
from finemoe.text.tokenizer import Tokenizer

_BIAS = ".router.selection_bias"
_SHOWN = 5
_PREFIXES = frozenset({"general", "tokenizer"})
# Tensors that some writers add and nobody needs, by how their names end.
_REDUNDANT = {
    "attn_rot_embd.weight": "rotary frequencies, which are computed",
    "attn_k_b.weight": "a part of attn_kv_b, which is there too",
    "attn_v_b.weight": "a part of attn_kv_b, which is there too",
}


@final
class GGUFSource:
    """A GGUF file as others wrote it: tensors under their names, and an account of what becomes of each.

    Understood from its header, and what is derived when asked for. `Source` is the same of a Hugging Face folder.
    """

    def __init__(self, file: GGUFFile, *, whole: bool = True, more: Mapping[str, Any] | None = None) -> None:
        self._whole = whole
        self.path = file.path
        self.metadata = {**file.metadata, **_added(file, more or {})}
        """Of the file, and what somebody added to it."""
        self.tensors: Mapping[str, StoredTensor] = file.tensors
        self.files = file.files
        """All shards."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def config(self) -> ModelConfig:
        """The model.

        Raises:
            CheckpointError: no model, or one that cannot be represented exactly; names the key.
        """
        return self._read[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was taken for keys that are missing, where another value would be another model.

        Raises:
            CheckpointError: as `config`.
        """
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[ModelConfig, tuple[str, ...]]:
        embedding = self.tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{self.path}: there is no {EMBEDDING} with two dimensions, so this is no model")
        factors = self.tensors.get(ROPE_FACTORS) if self._whole else None
        rows = None if factors is None or factors.nbytes > 1 << 20 else factors.read().float()
        return read_model(self.metadata, Facts(self.tensors.keys(), embedding.shape[0], rows), str(self.path))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor of ours, by name."""
        return model_shapes(self.config)

    @property
    def variants(self) -> Variants:
        """In what form the file holds what can be held in several."""
        return Facts(self.tensors.keys(), self.config.vocab_size, None).variants(self.architecture)

    @cached_property
    def account(self) -> Mapping[str, Stored]:
        """Every tensor that fills the model, by name, in the order of the file's bytes.

        Raises:
            CheckpointError: as `config`, or tensors that are missing, mis-shaped or unknown.
        """
        wanted = {stored.name: stored for stored in stored_tensors(self.config, self.variants)}
        absent = [f"{name} {list(stored.shape)}" for name, stored in wanted.items() if name not in self.tensors]
        self._refuse(absent, "are missing")
        misshaped = [
            f"{name} ({list(self.tensors[name].shape)} instead of {list(stored.shape)})"
            for name, stored in wanted.items()
            if self.tensors[name].shape not in (stored.shape, (1, *stored.shape))
        ]
        self._refuse(misshaped, "have another shape than the metadata give them")
        strange = [name for name in self.tensors if name not in wanted and name not in self.dropped]
        self._refuse(strange, "belong to nothing in this model")
        return {name: wanted[name] for name in self.tensors if name in wanted}

    @cached_property
    def dropped(self) -> Mapping[str, str]:
        """Tensors that are not needed -> why."""
        factors = {ROPE_FACTORS: "became rope.scaling"} if ROPE_FACTORS in self.tensors else {}
        unsplit = any(name.endswith("attn_kv_b.weight") for name in self.tensors)
        return factors | {
            name: reason
            for name in self.tensors
            for end, reason in _REDUNDANT.items()
            if name.startswith("blk.") and name.endswith(f".{end}") and ("attn_kv_b" not in reason or unsplit)
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a careful reader wants to know beside the configuration."""
        notes = [f"{name} is left out: {why}" for name, why in self.dropped.items()]
        if not has_tokenizer(self.metadata):
            notes.append(f"{self.path}: holds no tokenizer")
        if self.variants.single_experts:
            notes.append("experts are stored one by one, as before April 2024; llama.cpp opens such files no longer")
        routers = {block.feed_forward.router.kind for block in self.config.blocks if block.feed_forward.kind == "moe"}
        if "group_limited" in routers:
            notes.append("groups of experts are ranked by their best score, as DeepSeek-V2 does; llama.cpp takes two")
        return tuple(notes)

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"{self.path}: {len(names)} tensors {what}: {', '.join(names[:_SHOWN])}{more}")

    def dtypes(self) -> dict[str, torch.dtype]:
        """What each of our tensors is stored as: the narrowest type that holds all its parts."""
        account = self.account  # first: shapes that no file has would be too much even without memory
        found = {name: torch.float32 for name in self.shapes if name.endswith(_BIAS)}
        for name, stored in account.items():
            ours, dtype = stored.source.ours, self.tensors[name].kind.dtype
            found[ours] = torch.promote_types(found.get(ours, dtype), dtype)
        return found

    def formats(self) -> dict[str, Format]:
        """Of those of our tensors whose blocks can stay as they are: large, of one known format, and not transposed."""
        kinds: dict[str, set[str]] = {}
        for name, stored in self.account.items():
            for part in stored.parts():
                kind, columns = self.tensors[name].kind.name, self.tensors[name].shape[-1]
                fits = may_be_small(part.ours) and part.turn != "transposed"
                fits &= kind not in FORMATS or columns % FORMATS[kind].size == 0  # BF16 fills up no row
                kinds.setdefault(part.ours, set()).add(kind if fits else "")
        one = {ours: found.pop() for ours, found in kinds.items() if len(found) == 1}
        return {ours: FORMATS[name] for ours, name in one.items() if name in FORMATS}

    def lying(self, small: Mapping[str, Format]) -> dict[str, Tensor]:
        """The blocks of those in `small` that lie in the file as they do in ours, mapped: as `storage.memory.mapped`
        says, and nobody looks whether they are numbers.

        Raises:
            CheckpointError, RunError: as `mapped`.
        """
        infos = []
        for name, stored in self.account.items():
            ours, their = stored.source.ours, self.tensors[name]
            if stored.lies_whole and ours in small:
                shape = (*self.shapes[ours][:-1], their.kind.row_bytes(their.shape[-1]))
                infos.append(TensorInfo(ours, torch.uint8, shape, their.path, their.offset, their.nbytes))
        return {ours: rows.unflatten(-1, (-1, small[ours].bytes)) for ours, rows in mapped(infos).items()}

    def parts(self, small: Collection[str] = (), lying: Mapping[str, Tensor] | None = None) -> Iterator[Part]:
        """Every tensor of ours, part by part, each read when its turn comes, and dequantised unless it is in `small`;
        those of `lying` whole, as they are there.

        Raises:
            CheckpointError: the file was cut short, or holds a number that is none.
        """
        lying = lying or {}
        yield from self.zeros()
        yield from ((ours, (), tensor) for ours, tensor in lying.items())
        for name, stored in self.account.items():
            if stored.source.ours in lying:
                continue
            tensor, row = self.tensors[name], 0
            for part in stored.parts():
                raw = tensor.raw(row, part.rows)
                if part.ours in small:
                    yield part.ours, part.index, self._blocks(name, part, raw)
                else:
                    values = decode(raw, tensor.kind, tensor.shape[-1])
                    check_finite(values, f"{self.path}: {name}")
                    yield part.ours, part.index, part.to_ours(values)
                row += part.rows

    def _blocks(self, name: str, part: Placed, raw: bytearray) -> Tensor:
        rows = torch.frombuffer(raw, dtype=torch.uint8).view(part.rows, -1)
        blocks = part.blocks_to_ours(rows, FORMATS[self.tensors[name].kind.name].bytes)
        if not all_finite(blocks):
            raise CheckpointError(f"{self.path}: {name}: numbers or scales are NaN or infinite")
        return blocks

    def zeros(self) -> Iterator[Part]:
        """Selection biases that the file leaves out."""
        there = {stored.source.ours for stored in self.account.values()}
        for name, shape in self.shapes.items():
            if name.endswith(_BIAS) and name not in there:
                yield name, (), torch.zeros(shape)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the metadata.

        Raises:
            CheckpointError, DataError: there is none, or none that can be expressed exactly.
        """
        return tokenizer_of(self.metadata, str(self.path))

    def chat_template(self) -> ChatTemplate | None:
        """The chat template in the metadata; None: there is none.

        Raises:
            CheckpointError, DataError: it is damaged.
        """
        return template_of(self.metadata, str(self.path))


def _added(file: GGUFFile, more: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that the file lacks, under their full keys.

    Raises:
        CheckpointError: it has one of them already.
    """
    architecture = file.metadata.get("general.architecture", "")
    full = {
        key if "." in key and key.split(".")[0] in _PREFIXES | {architecture} else f"{architecture}.{key}": value
        for key, value in more.items()
    }
    for key in full:
        if key in file.metadata:
            there = str(file.metadata[key])[:80]
            raise CheckpointError(f"{file.path}: {key} is {there} already; only metadata that is missing can be added")
    return full


def open_gguf(
    path: str | os.PathLike[str], *, whole: bool = True, metadata: Mapping[str, Any] | None = None
) -> GGUFSource:
    """Open a GGUF file, or the first of several shards, by its header.

    Args:
        path: the file, or the first of its shards.
        whole: the tensors must follow their header. Where they need not, sizes are those of the model, and rotary
            frequencies, which a tensor may scale, are plain.
        metadata: what the file does not say and should, by key, with or without the architecture before it.

    Raises:
        CheckpointError: no GGUF file, or damaged.
        ConfigError: the `gguf` package is not installed.
    """
    return GGUFSource(read_header(Path(path), whole=whole), whole=whole, more=metadata)


def load_gguf(
    path: str | os.PathLike[str], kernels: Kernels | None = None, *, dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """The model of a GGUF file, in eval mode.

    Args:
        path: the file, or the first of its shards.
        kernels: how to compute.
        dtype: of the weights; None keeps what is stored, quantised ones in float32. Routers are float32 all the same.

    Raises:
        CheckpointError: damaged, or not exactly representable.
    """
    source = open_gguf(path)
    for text in source.warnings:
        logger.warning("%s", text)
    return build(source.config, kernels, source.dtypes(), source.parts(), dtype)


def import_gguf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> ImportReport:
    """Convert a GGUF file to an imported folder.

    The folder `out` appears when all is done. Interrupted, the work lies in `<out>.partial`, and the same call goes on
    with it. Holds at most one tensor of the file in memory; of stacked experts one expert.

    Args:
        source: the file, or the first of its shards; never written to.
        out: to make; absent or empty.
        metadata: what the file does not say and should, by key: `{"expert_group_count": 8}`.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: the source is damaged, or cannot be represented exactly; nothing is left behind.
        RunError: the disk is full or unwritable.
    """
    started = time.monotonic()
    check_apart(source, out)
    place = check_free(Path(out))
    opened = open_gguf(source, metadata=metadata)
    dtypes = opened.dtypes()
    specs = [TensorSpec(name, dtypes[name], shape) for name, shape in opened.shapes.items()]
    companions, left = companions_of(opened.metadata, str(opened.path))
    nbytes = sum(spec.nbytes for spec in specs) + sum(len(data) for data in companions.values())
    headers = [(t.name, t.kind.name, t.shape, t.offset) for t in opened.tensors.values()]
    mark = fingerprint("import", opened.files, headers, dict(metadata or {}))
    count = len(opened.tensors) + len(specs)
    with workspace(place, mark, nbytes, tensors=count) as folder, ImportedWriter(folder, specs, []) as writer:
        sums, resumed = _convert(opened, writer, quiet)
        about = {"family": opened.architecture, "format": "gguf"}
        files = writer.finish(opened.config, about, _record(opened, sums), companions, quiet=quiet)
    kinds = [opened.tensors[name].kind.name for name in opened.account]
    return ImportReport(
        path=place,
        family=opened.architecture,
        config=opened.config,
        loaded=len(opened.account),
        dequantized=sum(kind not in PLAIN for kind in kinds),
        carried={},
        nbytes=sum(file.nbytes for file in files),
        resumed=resumed,
        seconds=time.monotonic() - started,
        notes=opened.notes,
        warnings=(*opened.warnings, *left),
    )


def _convert(opened: GGUFSource, writer: ImportedWriter, quiet: bool) -> tuple[dict[str, str], int]:
    """Write what is still to be written; the checksum of each source tensor, and how many were done already."""
    sums, resumed = {}, 0
    dtypes = writer.weights.dtypes
    for name, _, zeros in opened.zeros():
        writer.weights.write(name, zeros)
    total = sum(opened.tensors[name].nbytes for name in opened.account)
    with mebibytes(f"importing {opened.path.name}", total, quiet) as advance:
        for name, stored in opened.account.items():
            tensor, digest, row, done = opened.tensors[name], hashlib.sha256(), 0, True
            for part in stored.parts():
                raw = tensor.raw(row, part.rows)
                digest.update(raw)
                if writer.weights.facts(part.ours, part.index) is None:
                    values = decode(raw, tensor.kind, tensor.shape[-1])
                    check_finite(values, f"{opened.path}: {name}")
                    writer.weights.write(part.ours, part.to_ours(values).to(dtypes[part.ours]), part.index)
                    done = False
                row += part.rows
            sums[name] = digest.hexdigest()
            resumed += done
            advance(tensor.nbytes)
    if resumed:
        logger.info("%d tensors were there from an interrupted import", resumed)
    return sums, resumed


def _record(opened: GGUFSource, sums: Mapping[str, str]) -> dict[str, Any]:
    """source.json: the metadata, without the lists that tokenizer.json holds, and an account of every tensor."""
    lists = {f"tokenizer.ggml.{name}" for name in LISTS}
    table: dict[str, Any] = {}
    for name, tensor in opened.tensors.items():
        facts: dict[str, Any] = {"dtype": tensor.kind.name, "shape": list(tensor.shape)}
        if name in sums:
            table[name] = {"status": "loaded", **facts, "sha256": sums[name]}
        else:
            reason = opened.dropped[name]
            sha = hashlib.sha256(tensor.raw(0, tensor.rows)).hexdigest()
            table[name] = {"status": "dropped", "reason": reason, **facts, "sha256": sha}
    config: dict[str, Tensor | Any] = {key: value for key, value in opened.metadata.items() if key not in lists}
    return {"config": config, "tensors": table}
