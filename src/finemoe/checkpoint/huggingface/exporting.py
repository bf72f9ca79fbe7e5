"""From an imported folder or a run to a Hugging Face folder: the import's placements, read backwards."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.huggingface.accounting import FP8, SCALE_SUFFIX, split_copies
from finemoe.checkpoint.huggingface.families import FAMILIES, representable_as
from finemoe.checkpoint.huggingface.fp8 import BLOCK, Block, block_of, factors_of, quantize, scale_shape
from finemoe.checkpoint.huggingface.settling import HEAD, settle
from finemoe.checkpoint.kinds import SOURCE
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.memory import check_finite
from finemoe.checkpoint.storage.safetensors import DTYPES
from finemoe.checkpoint.storage.store import TensorStore, write_file
from finemoe.checkpoint.storage.workspace import check_apart, check_free, fingerprint, workspace
from finemoe.checkpoint.weights.exportable import Exportable, open_exportable
from finemoe.checkpoint.weights.placement import Placement
from finemoe.core.config import did_you_mean
from finemoe.core.errors import CheckpointError, named
from finemoe.core.logs import mebibytes

_TORCH_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EXPORT_DTYPES = tuple(_TORCH_NAMES)
"""What `export_hf` takes as `dtype`."""
_QUANTIZED_PARTS = (".self_attn.", ".mlp.", ".experts.", ".block_sparse_moe.")


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    path: Path
    family: str
    verbatim_config: bool
    """config.json is the one that was imported."""
    tensors: int
    fp8_kept: int
    """FP8 blocks that kept the factor they came with."""
    fp8_new: int
    """FP8 blocks with a factor of their own."""
    nbytes: int
    resumed: int
    """Tensors that an interrupted export had done."""
    seconds: float
    notes: tuple[str, ...]
    """What the new folder does not hold, or holds differently."""


@dataclass(frozen=True)
class _Plan:
    """What is written, tensor by tensor."""

    family: str
    raw: dict[str, Any]
    verbatim: bool
    ours: Mapping[str, Placement]
    """Their key -> where we have it."""
    carried: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    quantized: frozenset[str]
    block: Block
    power_of_two: bool
    notes: tuple[str, ...]


def export_hf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    family: str | None = None,
    dtype: str | None = None,
    fp8: bool = False,
    quiet: bool = False,
) -> ExportReport:
    """Write an imported folder, or the newest checkpoint of a run, as a Hugging Face folder.

    What was imported and not changed comes out as it was, bit for bit. Interrupted, the work lies in `<out>.partial`,
    and the same call goes on with it.

    Args:
        source: imported folder, run directory, or one checkpoint of a run.
        out: to make; absent or empty.
        family: `model_type` to write; None: the one that was imported, or the first that represents the model exactly.
        dtype: "bf16", "fp16" or "fp32" for all but router and FP8; None: as stored.
        fp8: write attention and feed-forward matrices as block-scaled FP8. What came as FP8 goes out as FP8 anyway,
            unless `dtype` says otherwise.
        quiet: no progress on stderr.

    Raises:
        CheckpointError: the model is not exactly representable, or the source damaged; nothing is left behind.
        RunError: the disk is full or unwritable.
    """
    started = time.monotonic()
    check_apart(source, out)
    place = check_free(Path(out))
    if dtype is not None and dtype not in _TORCH_NAMES:
        raise CheckpointError(f"dtype {dtype!r} is not written{did_you_mean(dtype, EXPORT_DTYPES)}")
    opened = open_exportable(Path(source))
    if opened.small:
        raise CheckpointError(
            f"{opened.path} was made small, in blocks that no Hugging Face class reads: export the model that it was "
            "made of, or, if there is none, export it as OUT.gguf, and that file as a folder of what it stands for"
        )
    plan = _plan(opened, family, None if dtype is None else _TORCH_NAMES[dtype], fp8)
    nbytes = sum(spec.nbytes for spec in plan.specs) + sum(len(data) for data in opened.companions.values())
    mark = fingerprint("export", opened.tensors.files, opened.tensors.headers(), [plan.family, dtype, fp8, plan.raw])
    with workspace(place, mark, nbytes, tensors=len(plan.specs)) as folder:
        with TensorStore(folder, plan.specs) as store:
            kept, new, resumed = _convert(opened, plan, store, quiet)
            files = store.finish(quiet=quiet)
        files += [write_file(folder / name, data) for name, data in opened.companions.items()]
        files.append(write_file(folder / "config.json", (json.dumps(plan.raw, indent=2) + "\n").encode()))
    return ExportReport(
        path=place,
        family=plan.family,
        verbatim_config=plan.verbatim,
        tensors=len(plan.specs),
        fp8_kept=kept,
        fp8_new=new,
        nbytes=sum(file.nbytes for file in files),
        resumed=resumed,
        seconds=time.monotonic() - started,
        notes=(*plan.notes, *opened.notes),
    )


def _plan(opened: Exportable, family: str | None, dtype: torch.dtype | None, fp8: bool) -> _Plan:
    name = choose_family(opened, family)
    account = opened.account if name == opened.family else {}
    raw, verbatim = _config_json(opened, name, account)
    ours = _keys(opened, name, account)
    came_as_fp8 = {key for key in ours if account.get(key, {}).get("dtype") == "F8_E4M3"}
    quantized: set[str] = set()
    if fp8 or (came_as_fp8 and dtype is None):
        quantized = came_as_fp8 or {key for key, placement in ours.items() if _worth_quantizing(key, placement)}
        if not quantized:
            raise CheckpointError(f"{opened.path}: has no matrix that would be written as FP8")
    factors = {key + SCALE_SUFFIX for key in came_as_fp8}
    carried = tuple(key for key in opened.carried.tensors if account and key not in factors)
    block = block_of(opened.raw) if came_as_fp8 else BLOCK
    specs: dict[str, TensorSpec] = {}
    for key in _ordered((*ours, *carried), account):
        if key not in ours:
            info = opened.carried.info(key)
            specs[key] = TensorSpec(key, info.dtype, info.shape)
        elif key in quantized:
            shape = ours[key].shape
            specs[key] = TensorSpec(key, FP8, shape)
            specs[key + SCALE_SUFFIX] = TensorSpec(
                key + SCALE_SUFFIX, _factor_type(opened, key), scale_shape(shape, block)
            )
        else:
            specs[key] = TensorSpec(key, _dtype(key, ours[key], opened, account, dtype), ours[key].shape)
    came = opened.raw.get("quantization_config") if came_as_fp8 else None
    settings = _settle(raw, quantized, block, ours, dtype, specs.values(), verbatim, came)
    lost = [key for key in opened.carried.tensors if key not in specs and key not in factors]
    notes = [f"{len(lost)} carried tensors are not of family {name} and are left out: {lost[0]} ..."] if lost else []
    notes += [
        f"not in config.json: {text}, which concerns training alone" for text in FAMILIES[name].lost(opened.config)
    ]
    if not FAMILIES[name].native:
        notes.append(f"transformers has no class of its own for {name}; it needs the code of the published repository")
    if came_as_fp8 and not quantized:
        notes.append(f"{len(came_as_fp8)} tensors came as FP8 and are written out in full")
    return _Plan(
        family=name,
        raw=raw,
        verbatim=verbatim,
        ours=ours,
        carried=carried,
        specs=tuple(specs.values()),
        quantized=frozenset(quantized),
        block=block,
        power_of_two=settings.get("scale_fmt") == "ue8m0",
        notes=tuple(notes),
    )


def choose_family(opened: Exportable, family: str | None) -> str:
    """The family that is written: `family`, or as imported, or the first that computes the model.

    Raises:
        CheckpointError: no such family, or none computes this model.
    """
    if family is not None:
        if family not in FAMILIES:
            raise CheckpointError(f"family {family!r} is not supported{did_you_mean(family, sorted(FAMILIES))}")
        return family
    if opened.family is not None and opened.family in FAMILIES:
        return opened.family
    refusals = representable_as(opened.config)
    fit = [name for name, refusal in refusals.items() if refusal is None]
    if fit:
        return fit[0]
    names_by_reason: dict[str, list[str]] = {}
    for name, refusal in refusals.items():
        reason = str(refusal).removeprefix(f"the model cannot be written as {name}: ")
        names_by_reason.setdefault(reason, []).append(name)
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items())
    raise CheckpointError(f"{opened.path}: no family computes this model. {why}")


def _config_json(opened: Exportable, name: str, account: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The imported config.json while it still says what the model is, else a new one; and which it was."""
    if account:
        with named(opened.path / SOURCE):
            own_head = "copy_of" not in account.get(HEAD, {})
            if settle(FAMILIES[name], opened.raw, account.keys(), lambda: own_head).config == opened.config:
                return dict(opened.raw), True
    with named(opened.path):
        raw = FAMILIES[name].from_config(opened.config, max_positions=opened.max_positions, **opened.token_ids)
    return raw, False


def _keys(opened: Exportable, name: str, account: Mapping[str, Any]) -> dict[str, Placement]:
    """Where we have each of their keys.

    Of the copies those that the import found; in a new checkpoint those of prediction modules, which others open with
    the module, and not the head of tied embeddings.
    """
    ours, again, _ = split_copies(FAMILIES[name].placements(opened.config))
    found = {key for key, entry in account.items() if entry["status"] == "loaded"}
    copies = found if account else {key for key in again if key != "lm_head.weight"}
    return ours | {key: placement for key, placement in again.items() if key in copies}


def _ordered(keys: tuple[str, ...], account: Mapping[str, Any]) -> list[str]:
    """In the order of the source, where there is one."""
    rank = {key: at for at, key in enumerate(account)}
    return sorted(keys, key=lambda key: rank.get(key, len(rank)))


def _factor_type(opened: Exportable, key: str) -> torch.dtype:
    """Of FP8 factors: as they came."""
    came = opened.carried.tensors.get(key + SCALE_SUFFIX)
    return torch.float32 if came is None else came.dtype


def _is_router(placement: Placement) -> bool:
    return ".router." in placement.ours


def _worth_quantizing(key: str, placement: Placement) -> bool:
    """Matrices of attention and experts, as DeepSeek-V3 does; not router, embedding, head or norms."""
    gate = key.endswith("gate.weight")  # the router and Qwen's gate of the shared expert
    matrix = len(placement.shape) == 2 and key.endswith(".weight")
    return matrix and not gate and not _is_router(placement) and any(part in key for part in _QUANTIZED_PARTS)


def _dtype(
    key: str, placement: Placement, opened: Exportable, account: Mapping[str, Any], wanted: torch.dtype | None
) -> torch.dtype:
    stored = opened.tensors.info(placement.ours).dtype
    came = DTYPES.get(account.get(key, {}).get("dtype", ""), stored)
    if wanted is not None and not _is_router(placement):
        return wanted
    return stored if came == FP8 else came


def _settle(
    raw: dict[str, Any],
    quantized: set[str],
    block: Block,
    ours: Mapping[str, Placement],
    dtype: torch.dtype | None,
    specs: Any,
    verbatim: bool,
    came: Any,
) -> dict[str, Any]:
    """Make config.json say what the weights are; its quantisation settings, {} when there are none.

    `came` are those that the weights came with as FP8; None where they did not. How factors are rounded is kept of them
    even where the rest is new, as some kernels read factors as powers of two.
    """
    if dtype is not None or not verbatim:
        sizes: dict[torch.dtype, int] = {}
        for spec in specs:
            if spec.dtype in _TORCH_NAMES.values():
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        main = dtype or max(sizes, key=lambda found: sizes[found], default=torch.float32)
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(main).removeprefix("torch.")
    if not quantized:
        raw.pop("quantization_config", None)
        return {}
    if not (verbatim and isinstance(came, dict)):
        left = [k for k, p in ours.items() if len(p.shape) == 2 and k.endswith(".weight") and k not in quantized]
        raw["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(block),
            "modules_to_not_convert": sorted(key.removesuffix(".weight") for key in left),
            **({"scale_fmt": came["scale_fmt"]} if isinstance(came, dict) and came.get("scale_fmt") else {}),
        }
    settings: dict[str, Any] = raw["quantization_config"]
    return settings


def _convert(opened: Exportable, plan: _Plan, store: TensorStore, quiet: bool) -> tuple[int, int, int]:
    """Write what is still to be written: FP8 blocks with kept and new factors, tensors that were done already."""
    kept = new = resumed = 0
    dtypes = store.dtypes
    with mebibytes(f"exporting {opened.path.name}", opened.tensors.nbytes, quiet) as advance:
        for key, placement in plan.ours.items():
            where = f"{opened.path}: {placement.ours}"
            facts = store.facts(key)
            resumed += facts is not None
            if key in plan.quantized:
                if facts is None or store.facts(key + SCALE_SUFFIX) is None:
                    facts = _write_fp8(opened, plan, store, key, placement)
                kept, new = kept + facts["kept"], new + facts["new"]
            elif facts is None:
                with store.part(key) as part:
                    for chunk in opened.tensors.chunks(placement.ours, placement.index):
                        converted = chunk.to(dtypes[key])
                        check_finite(converted, f"{where} as {dtypes[key]}")
                        part.append(converted)
            advance(math.prod(placement.shape) * opened.tensors.info(placement.ours).dtype.itemsize)
        for key in plan.carried:
            if store.facts(key) is None:
                with store.part(key) as part:
                    for chunk in opened.carried.chunks(key):
                        part.append(chunk)
    return kept, new, resumed


def _write_fp8(opened: Exportable, plan: _Plan, store: TensorStore, key: str, placement: Placement) -> dict[str, int]:
    """One matrix and its factors; how many of these are as they came."""
    came = key + SCALE_SUFFIX
    old = opened.carried.read(came) if came in opened.carried.tensors else None
    stored = _factor_type(opened, key)
    factors = torch.empty(scale_shape(placement.shape, plan.block))
    with store.part(key) as part:
        for row, chunk in _bands(opened, placement, plan.block):
            check_finite(chunk, f"{opened.path}: {placement.ours}")
            given = None if old is None else factors_of(old, row, len(chunk), plan.block)
            weight, fresh = quantize(chunk, given, power_of_two=plan.power_of_two, block=plan.block, stored=stored)
            factors_of(factors, row, len(chunk), plan.block).copy_(fresh)
            part.append(weight)
        kept = 0 if old is None else int((factors == old.float()).sum())
        part.facts.update(kept=kept, new=factors.numel() - kept)
    store.write(came, factors.to(stored))
    return part.facts


def _bands(opened: Exportable, placement: Placement, block: Block) -> Iterator[tuple[int, Tensor]]:
    row = 0
    for chunk in opened.tensors.chunks(placement.ours, placement.index, multiple=block[0]):
        yield row, chunk
        row += len(chunk)
