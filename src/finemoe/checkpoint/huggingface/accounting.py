"""Every key accounted for: what becomes of each tensor of a Hugging Face folder, decided from its headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from finemoe.checkpoint.huggingface import keys as hf_keys
from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fp8 import BLOCK, FACTOR_TYPES, Block, scale_shape
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES, TensorFolder, span
from finemoe.checkpoint.weights.placement import Placement
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig

SCALE_SUFFIX = "_scale_inv"
"""`x.weight_scale_inv` holds the factors of the FP8 `x.weight`."""
FP8 = torch.float8_e4m3fn
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SHOWN = 5
_BASE = "model."


@dataclass(frozen=True)
class Account:
    """What becomes of each source tensor: it is in exactly one of `loaded`, `copies` and `carried`."""

    loaded: Mapping[str, Placement]
    """Fill a part of ours."""
    copies: Mapping[str, str]
    """Hold to the bit what a loaded one holds, and our model has once -> that one."""
    carried: Mapping[str, str]
    """Kept verbatim -> why."""
    scales: Mapping[str, str]
    """FP8 weight -> the carried tensor with its factors."""
    warnings: tuple[str, ...]
    """Copies that are none."""


def take_account(
    tensors: TensorFolder,
    config: ModelConfig,
    family: Family,
    aside: Mapping[str, str] | None = None,
    block: Block = BLOCK,
) -> Account:
    """Decide what becomes of each tensor of a `family` checkpoint of `config`.

    Args:
        tensors: of the checkpoint.
        config: of the model.
        family: of the checkpoint.
        aside: tensors that are carried, for the reason given.
        block: of weights that share an FP8 factor.

    Raises:
        CheckpointError: tensors missing, mis-shaped, of an unfit dtype, or unknown; the first few are named.
    """
    check_count(config, len(tensors.tensors))
    loaded, again, originals = split_copies(family.placements(config))
    present = {name: placement for name, placement in again.items() if name in tensors.tensors}
    wanted = {**loaded, **present}
    missing = [name for name in loaded if name not in tensors.tensors]
    _refuse("missing", [f"{n} {list(loaded[n].shape)}" for n in missing], _renamed(missing, tensors.tensors))
    _refuse("of another shape than config.json gives", _misshaped(tensors, wanted))
    scales = {name: name + SCALE_SUFFIX for name in wanted if tensors.info(name).dtype == FP8}
    _refuse("of an element type that is not read", _unfit(tensors, wanted, scales))
    _refuse(f"of another shape than blocks of {block[0]} x {block[1]} have factors", _miscut(tensors, scales, block))
    carried = {scale: f"FP8 factors of {name}" for name, scale in scales.items()}
    copies, warnings, unknown = {}, [], []
    for name in present:
        original = originals[name]
        if _same(tensors, name, original):
            copies[name] = original
        elif tensors.equal(name, original):
            carried[name] = f"the numbers of {original}, in another element type"
        else:
            carried[name] = f"should equal {original}, but does not"
            warnings.append(
                f"{name} should equal {original}, which our model uses for both, but does not; kept, not used"
            )
    for name in tensors.tensors:
        if name not in wanted and name not in carried:
            reason = (aside or {}).get(name) or hf_keys.ignorable(name)
            reason = "holds no element" if 0 in tensors.info(name).shape else reason
            if reason is None:
                unknown.append(f"{name} {_facts(tensors, name)}")
            else:
                carried[name] = reason
    _refuse("known to no part of the model", unknown)
    return Account(loaded, copies, carried, scales, tuple(warnings))


def check_count(config: ModelConfig, count: int) -> None:
    """Refuse, before their names are listed, a configuration of far more tensors than the `count` that there are.

    Raises:
        CheckpointError: it is so.
    """
    layers = [block.feed_forward for block in (*config.blocks, *config.mtp)]
    needed = len(layers) + 3 * sum(layer.num_routed_experts for layer in layers if isinstance(layer, MoEConfig))
    if needed > 4 * count + 10_000:
        raise CheckpointError(f"config.json asks for more than {needed:,} tensors, and the weights hold {count:,}")


def split_copies(
    placements: Sequence[Placement],
) -> tuple[dict[str, Placement], dict[str, Placement], dict[str, str]]:
    """By their key: placements; those that fill a part again, and may be missing; and which key fills it first."""
    first: dict[tuple[str, str], str] = {}
    loaded: dict[str, Placement] = {}
    again: dict[str, Placement] = {}
    originals: dict[str, str] = {}
    for placement in placements:
        place = (placement.ours, str(placement.index))
        if place in first:
            again[placement.theirs] = placement
            originals[placement.theirs] = first[place]
        else:
            first[place] = placement.theirs
            loaded[placement.theirs] = placement
    return loaded, again, originals


def _renamed(missing: Sequence[str], names: Iterable[str]) -> str:
    """What the names that are there begin with, or lack, where that alone tells them from the missing ones."""
    there = set(names)
    for prefix in {name.removesuffix(missing[0]) for name in there if missing and name.endswith(f".{missing[0]}")}:
        if all(prefix + name in there for name in missing):
            return f". The names that are there begin with {prefix!r}: take it away from each, as `state_dict` has them"
    lacking = missing and all(name.removeprefix(_BASE) in there for name in missing if name.startswith(_BASE))
    if lacking and missing[0].startswith(_BASE):
        return f". The names that are there lack {_BASE!r}: save the whole model for causal language modelling"
    return ""


def _refuse(what: str, names: Sequence[str], hint: str = "") -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        raise CheckpointError(f"{count} {what}: {', '.join(names[:_SHOWN])}{more}{hint}")


def _facts(tensors: TensorFolder, name: str) -> str:
    info = tensors.info(name)
    return f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"


def _misshaped(tensors: TensorFolder, wanted: Mapping[str, Placement]) -> list[str]:
    return [
        f"{name} ({list(tensors.info(name).shape)} instead of {list(placement.shape)})"
        for name, placement in wanted.items()
        if tensors.info(name).shape != placement.shape
    ]


def _miscut(tensors: TensorFolder, scales: Mapping[str, str], block: Block) -> list[str]:
    wanted = {scale: scale_shape(tensors.info(name).shape, block) for name, scale in scales.items()}
    return [
        f"{scale} ({list(tensors.info(scale).shape)} instead of {list(shape)})"
        for scale, shape in wanted.items()
        if tensors.info(scale).shape != shape
    ]


def _unfit(tensors: TensorFolder, wanted: Iterable[str], scales: Mapping[str, str]) -> list[str]:
    found = []
    for name in wanted:
        info = tensors.info(name)
        if name not in scales:
            if info.dtype not in _FLOATS:
                found.append(f"{name} ({DTYPE_NAMES[info.dtype]})")
            continue
        scale = tensors.tensors.get(scales[name])
        if len(info.shape) != 2 or scale is None:
            found.append(f"{name} (F8_E4M3 without {scales[name]})")
        elif scale.dtype not in FACTOR_TYPES:
            found.append(f"{scale.name} ({DTYPE_NAMES[scale.dtype]}, which no factor is)")
    return found


def _same(tensors: TensorFolder, a: str, b: str) -> bool:
    return tensors.info(a).dtype == tensors.info(b).dtype and tensors.sha256(a) == tensors.sha256(b)


def our_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that we keep a source tensor in: its own; FP8 with its factors is bf16."""
    return torch.bfloat16 if dtype == FP8 else dtype


def our_specs(config: ModelConfig, tensors: TensorFolder, account: Account) -> tuple[list[TensorSpec], list[str]]:
    """Our tensors, and notes on those whose parts came in several types; they get the narrowest that holds all.

    Raises:
        CheckpointError: the placements do not fill the model exactly.
    """
    parts: dict[str, list[Placement]] = {}
    for placement in account.loaded.values():
        parts.setdefault(placement.ours, []).append(placement)
    shapes = model_shapes(config)
    if shapes.keys() != parts.keys():
        raise CheckpointError(f"no key of this family fills {', '.join(sorted(shapes.keys() ^ parts.keys())[:_SHOWN])}")
    specs, notes = [], []
    for ours, placements in parts.items():
        _check_filled(ours, shapes[ours], placements)
        dtypes = {our_dtype(tensors.info(placement.theirs).dtype) for placement in placements}
        dtype = dtypes.pop()
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        if dtypes:
            notes.append(f"{ours}: its parts have several element types; kept as {DTYPE_NAMES[dtype]}, which holds all")
        specs.append(TensorSpec(ours, dtype, shapes[ours]))
    return specs, notes


def _check_filled(ours: str, shape: tuple[int, ...], placements: Sequence[Placement]) -> None:
    """Every element exactly once."""
    at = 0
    for start, count, _ in sorted(span(shape, placement.index) for placement in placements):
        if start != at:
            break
        at += count
    if at != math.prod(shape) or any(span(shape, p.index)[2] != p.shape for p in placements):
        raise CheckpointError(f"the keys of this family do not fill {ours} {list(shape)} exactly")
