"""Which units of a model have the largest Fisher information: single weights, rows, or routed experts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from finemoe.methods.trainables.fisher import Fisher

Granularity = Literal["parameter", "row", "expert"]

STACK = re.compile(r"blocks\.(\d+)\.feed_forward\.experts\.(gate_up_proj|down_proj)")
"""Names of the tensors that hold the routed experts of a layer, and its number."""

_CHUNK = 1 << 24  # values whose bits are counted at once
_HALF = 16  # bits of a float32 that are counted in one pass


def masks_of(found: Fisher, share: float, granularity: Granularity) -> tuple[dict[str, Tensor], str]:
    """The masks of D: the units whose Fisher information is at or above the threshold, ties and all.

    The threshold is the order statistic at which `numpy.percentile(all, (1 - share) * 100)` and `>=` begin to keep. A
    routed expert that no token went to is unknown, not unimportant: it is not ranked, and kept.

    Returns:
        masks by parameter name, bool, True where a gradient is kept, of shapes that spread over the parameter's; and
        what was found, in words.
    """
    units = _units(found.values, granularity)
    known: dict[str, Tensor] = {}
    for name, values in units.items():
        stack = STACK.fullmatch(name)
        if stack is not None:
            known[name] = found.load[int(stack[1])].to(values.device) > 0
    # By expert both stacks of one have the same values: it is ranked once.
    ranked = [
        values[known[name]] if name in known else values
        for name, values in units.items()
        if granularity != "expert" or name.endswith("down_proj")
    ]
    number = sum(values.numel() for values in ranked)
    index = math.ceil((1 - Fraction(repr(share))) * (number - 1))
    threshold = order_statistic(ranked, index)
    masks = {name: values >= threshold.to(values.device) for name, values in units.items()}
    for name, seen in known.items():
        masks[name][~seen] = True
    kept = sum(int((values >= threshold.to(values.device)).sum()) for values in ranked)
    said = f"{kept:,} of {number:,} {_PLURAL[granularity]} are kept, from {threshold.item():.3g} on"
    unknown = sum(int((~seen).sum()) for name, seen in known.items() if name.endswith("down_proj"))
    if unknown:
        said += (
            f"; {unknown} routed experts saw no token, so that nothing is known of them: they are not ranked and keep "
            "training (trainable.fisher_sequences decides how much is read)"
        )
    return masks, said


_PLURAL = {"parameter": "weights", "row": "rows", "expert": "routed experts"}


def _units(values: Mapping[str, Tensor], granularity: Granularity) -> dict[str, Tensor]:
    """Mean Fisher information of the units of each parameter; both stacks of a layer have that of its experts."""
    if granularity == "parameter":
        return dict(values)
    if granularity == "row":
        return {name: one.mean(-1, keepdim=True) for name, one in values.items()}
    sums: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    layers = {name: name.rpartition(".")[0] for name in values}
    for name, layer in layers.items():
        sums[layer] = sums.get(layer, 0) + values[name].sum((1, 2), keepdim=True)
        sizes[layer] = sizes.get(layer, 0) + values[name][0].numel()
    return {name: sums[layer] / sizes[layer] for name, layer in layers.items()}


def order_statistic(parts: Sequence[Tensor], index: int) -> Tensor:
    """The value at `index`, from 0, if all parts lay in one sorted row; exact, and without that row.

    The bits of floats that are not negative are in the order of the floats, so that counting the upper halves, and
    then the lower ones of those that have the right upper half, leads to the value in two passes.

    Args:
        parts: float32, finite and not negative, of any shapes.
        index: below the number of all values.

    Returns:
        scalar float32.
    """
    prefix = 0
    for upper in (True, False):
        counts = torch.zeros(1 << _HALF, dtype=torch.int64)
        for part in parts:
            for bits in part.contiguous().view(torch.int32).flatten().split(_CHUNK):
                digits = bits >> _HALF if upper else bits[(bits >> _HALF) == prefix] & ((1 << _HALF) - 1)
                counts += torch.bincount(digits, minlength=1 << _HALF).cpu()
        reached = counts.cumsum(0)
        digit = int((reached <= index).sum())
        index -= int(reached[digit - 1]) if digit else 0
        prefix = prefix << _HALF | digit
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32)
