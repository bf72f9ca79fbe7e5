"""The weights of a checkpoint by their headers: every key accounted for, element types, FP8 blocks."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from finemoe.checkpoint.doctor.findings import Findings, few, number
from finemoe.checkpoint.doctor.subject import Held, Place, Subject
from finemoe.checkpoint.huggingface.accounting import SCALE_SUFFIX
from finemoe.checkpoint.huggingface.fp8 import BLOCK, FACTOR_TYPES, block_of, scale_shape
from finemoe.checkpoint.storage.safetensors import DTYPE_NAMES
from finemoe.checkpoint.weights.small import small_shape
from finemoe.core.errors import CheckpointError
from finemoe.model.quantised.blocks import FORMATS

_FP8 = "F8_E4M3"
_FACTORS = frozenset(DTYPE_NAMES[dtype] for dtype in FACTOR_TYPES)
_READ_AS_FLOATS = frozenset({"BF16", "F16", "F32", "F64", _FP8})


def account_for_keys(subject: Subject, found: Findings) -> dict[str, Any]:
    """What becomes of every tensor, as an import or a load would decide; counts, and the names of what is wrong."""
    held, places = subject.held, subject.places
    if places is None:
        return {"tensors": len(held)}
    missing = [name for name, place in places.items() if not place.optional and name not in held]
    misshaped = [
        f"{name} ({list(held[name].shape)} instead of {list(place.shape)})"
        for name, place in places.items()
        if name in held and not _fits(subject, held[name], place)
    ]
    scales = {name + SCALE_SUFFIX for name in places if name in held and held[name].dtype == _FP8}
    known = {*places, *scales, *subject.spare}
    unexpected = [name for name in held if name not in known and not name.endswith(SCALE_SUFFIX)]
    unread = [
        f"{name} ({held[name].dtype})"
        for name in places
        if name in held and subject.kind == "huggingface" and held[name].dtype not in _READ_AS_FLOATS
    ]
    for names, what in (
        (missing if subject.whole else [], "missing"),
        (misshaped, "of another shape than the configuration gives"),
        (unexpected, "known to no part of the model"),
        (unread, "of an element type that is not read"),
    ):
        if names:
            found.problem("weights", f"{_are(len(names))} {what}: {few(names)}")
    spare = {name: subject.spare[name] for name in subject.spare if name in held}
    if spare:
        reasons = "; ".join(dict.fromkeys(spare.values()))
        found.note("weights", f"{_are(len(spare))} not needed: {reasons}")
    kept = len(subject.carried) + sum(name in held for name in scales)
    return {
        "tensors": len(held) + len(subject.carried),
        "placed": sum(name in held for name in places) - len(misshaped),
        "carried": kept + (len(spare) if subject.kind == "huggingface" else 0),
        "dropped": len(spare) if subject.kind == "gguf" else 0,
        "missing": missing,
        "misshaped": misshaped,
        "unexpected": unexpected,
        "source": {status: len(names) for status, names in subject.source_status.items()},
    }


def _fits(subject: Subject, held: Held, place: Place) -> bool:
    """Whether a tensor has its shape, or is blocks that stand for it; some writers of GGUF files put a dimension of one
    before it."""
    if held.dtype == "U8" and subject.kind == "imported":
        return any(held.shape == small_shape(held.name, place.shape, kind) for kind in FORMATS.values())
    return held.shape == place.shape or (subject.kind == "gguf" and held.shape == (1, *place.shape))


def _are(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count:,} tensors are"


def count_dtypes(subject: Subject) -> list[dict[str, Any]]:
    """Tensors and bytes of each element type, the largest first."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for held in (*subject.held.values(), *subject.carried.values()):
        tensors[held.dtype] += 1
        nbytes[held.dtype] += held.nbytes
    return [{"dtype": dtype, "tensors": tensors[dtype], "bytes": size} for dtype, size in nbytes.most_common()]


def check_fp8(subject: Subject, found: Findings) -> dict[str, Any] | None:
    """Whether every FP8 matrix has its factors, of the right shape, finite and above 0; None where nothing is FP8."""
    held = {**subject.held, **subject.carried}
    quantized = [entry for entry in subject.held.values() if entry.dtype == _FP8]
    factors = [entry for entry in held.values() if entry.name.endswith(SCALE_SUFFIX)]
    if not quantized and not factors:
        return None
    alone, wrong = [], []
    try:
        block = block_of(subject.raw)
    except CheckpointError:  # told already, where config.json was read
        block = BLOCK
    for entry in quantized:
        scale = held.get(entry.name + SCALE_SUFFIX)
        if scale is None:
            alone.append(entry.name)
        elif len(entry.shape) != 2 or scale.shape != scale_shape(entry.shape, block) or scale.dtype not in _FACTORS:
            wrong.append(f"{scale.name} ({scale.dtype} {list(scale.shape)})")
    matrices = {entry.name for entry in quantized}
    idle = [f.name for f in factors if f.name in subject.held and f.name.removesuffix(SCALE_SUFFIX) not in matrices]
    bad, lost = _factor_values(factors, found)
    for names, one, many in (
        (alone if subject.whole else [], "FP8 matrix lacks its factors", "FP8 matrices lack their factors"),
        (wrong, "matrix has factors that do not fit it", "matrices have factors that do not fit them"),
        (idle if subject.whole else [], "tensor of factors has no FP8 matrix", "tensors of factors have no FP8 matrix"),
        (bad, "tensor of factors holds NaN or infinity", "tensors of factors hold NaN or infinity"),
        (lost, "tensor of factors holds 0 or less", "tensors of factors hold 0 or less"),
    ):
        if names:
            found.problem("fp8", f"{number(len(names), one, many)}: {few(names)}")
    blocks = sum(math.prod(scale.shape) for scale in factors)
    return {"matrices": len(quantized), "factors": len(factors), "blocks": blocks, "block": list(block)}


def _factor_values(factors: list[Held], found: Findings) -> tuple[list[str], list[str]]:
    """Names of factors that are not finite, and of those that are not above 0."""
    bad, lost = [], []
    for scale in factors:
        with found.guard("fp8"):
            pieces = [piece.float() for piece in scale.chunks()]
            if not all(bool(torch.isfinite(piece).all()) for piece in pieces):
                bad.append(scale.name)
            elif any(bool((piece <= 0).any()) for piece in pieces):
                lost.append(scale.name)
    return bad, lost
