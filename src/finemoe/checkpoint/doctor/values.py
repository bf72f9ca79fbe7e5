"""What stands in the weights: numbers that are none, precision of the routers, ranges of their selection biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.doctor.findings import Findings, few, number
from finemoe.checkpoint.doctor.subject import Held, Subject
from finemoe.checkpoint.huggingface.accounting import SCALE_SUFFIX
from finemoe.core.logs import mebibytes
from finemoe.model.quantised.blocks import all_finite

_SMALL = 1 << 20
_SMALL_IN_ALL = 512 << 20
_LAYER = re.compile(r"(blocks|mtp)\.(\d+)\.")
_PRECISE = ("F32", "F64")
_ENOUGH = (*_PRECISE, "BF16", "F16")


def check_values(subject: Subject, found: Findings, *, deep: bool, quiet: bool) -> dict[str, Any]:
    """Look for NaN and infinity in the small tensors, or in all; there for matrices of nothing but zeros too."""
    # FP8 factors have been looked at with their matrices.
    blocks = subject.blocks()
    tensors = [
        held
        for held in subject.held.values()
        if (held.floating or held.name in blocks) and not held.name.endswith(SCALE_SUFFIX)
    ]
    chosen = tensors if deep else _small(tensors)
    broken: list[str] = []
    empty: list[str] = []
    with mebibytes(f"reading {subject.path.name}", sum(held.nbytes for held in chosen), quiet or not deep) as advance:
        for held in chosen:
            with found.guard("weights"):
                bad, zeros = (0, False) if held.name in blocks else _look_at(held)
                if held.name in blocks and not all(map(all_finite, held.chunks())):
                    broken.append(f"{held.name} (scales of its blocks)")
                elif bad:
                    broken.append(f"{held.name} ({number(bad, 'element')})")
                elif zeros and len(held.shape) > 1:
                    empty.append(held.name)
            advance(held.nbytes)
    if broken:
        what = "tensor holds" if len(broken) == 1 else "tensors hold"
        found.problem("weights", f"{len(broken)} {what} NaN or infinity: {few(broken)}")
    if empty:
        what = "matrix holds" if len(empty) == 1 else "matrices hold"
        found.warning("weights", f"{len(empty)} {what} nothing but zeros: {few(empty)}")
    return {"looked_at": len(chosen), "of": len(tensors), "deep": deep}


def _small(tensors: list[Held]) -> list[Held]:
    """Norms, biases, factors and, of a small model, everything; up to a number of bytes."""
    chosen, nbytes = [], 0
    for held in tensors:
        if held.nbytes <= _SMALL and nbytes + held.nbytes <= _SMALL_IN_ALL:
            chosen.append(held)
            nbytes += held.nbytes
    return chosen


def _look_at(held: Held) -> tuple[int, bool]:
    """How many elements are NaN or infinite, and whether all are 0."""
    bad, zeros = 0, held.nbytes > 0
    for chunk in held.chunks():
        values = chunk.float() if chunk.dtype.itemsize == 1 else chunk
        values = torch.view_as_real(values) if values.is_complex() else values
        if not values.numel():
            continue
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):  # NaN is passed on
            bad += int((~torch.isfinite(values)).sum())
        zeros = zeros and not bad and bool(low == 0) and bool(high == 0)
    return bad, zeros


def check_routers(subject: Subject, found: Findings) -> dict[str, Any] | None:
    """Element types of router weights, and type and range of each selection bias; None where no layer routes."""
    weights, biases = (_by_layer(subject, ending) for ending in (".router.weight", ".router.selection_bias"))
    if not weights:
        return None
    coarse = sorted(layer for layer, held in weights.items() if held.dtype not in _ENOUGH)
    if coarse:
        found.warning("router", f"weights of less than 16 bits change which experts win: {_layers(coarse)}")
    rounded = sorted(layer for layer, held in biases.items() if held.dtype not in _PRECISE)
    if rounded:
        dtypes = "/".join(sorted({biases[layer].dtype for layer in rounded}))
        found.warning(
            "router",
            f"selection bias stored as {dtypes} in {_layers(rounded)}: rounding it changes which experts win; "
            "DeepSeek publishes it as F32",
        )
    ranges = [_range(layer, held, found) for layer, held in sorted(biases.items())]
    known = [entry for entry in ranges if entry["low"] is not None]
    if known and subject.kind not in ("run", "checkpoint") and all(e["low"] == e["high"] == 0 for e in known):
        found.warning(
            "router", "every selection bias is 0: the model was never balanced by it, or a conversion lost it"
        )
    return {"weights": sorted({held.dtype for held in weights.values()}), "bias": ranges}


def _by_layer(subject: Subject, ending: str) -> dict[int, Held]:
    """The tensors that fill entries of ours with that ending, by number of the layer; prediction modules come last."""
    layers = {}
    count = len(subject.config.blocks) if subject.config is not None else 0
    for name, place in (subject.places or {}).items():
        match = _LAYER.match(place.ours)
        if match is not None and place.ours.endswith(ending) and name in subject.held:
            layers[int(match[2]) + (count if match[1] == "mtp" else 0)] = subject.held[name]
    return layers


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers ({layers[0]} to {layers[-1]})"


def _range(layer: int, held: Held, found: Findings) -> dict[str, Any]:
    entry: dict[str, Any] = {"layer": layer, "dtype": held.dtype, "low": None, "high": None}
    with found.guard("router"):
        pieces: list[Tensor] = [chunk.float() for chunk in held.chunks() if chunk.numel()]
        bounds: Mapping[str, float] = {
            "low": min((piece.min().item() for piece in pieces), default=0.0),
            "high": max((piece.max().item() for piece in pieces), default=0.0),
        }
        if all(map(_finite, bounds.values())):
            entry.update(bounds)
    return entry


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
