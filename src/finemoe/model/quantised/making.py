"""Numbers as blocks of few bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finemoe.core.errors import ConfigError
from finemoe.model.quantised.blocks import Format


def quantise(values: Tensor, kind: Format) -> Tensor:
    """`values [..., columns]` as blocks `[..., blocks, bytes]` of Q8_0, Q4_0 or BF16; other formats are only read.

    BF16: every number rounded by itself, and not at all where it is one already. Q8_0: the largest number of a block is
    127 steps. Q4_0 has eight steps on one side of zero and seven on the other: of several scales around the one that
    maps the largest number to a whole step, the one with the least squares wins.
    Beside `values` and the result only pieces of a few rows are held.

    Raises:
        ConfigError: a number that is none, or too large for bfloat16, or for a scale in float16.
    """
    columns, blocks = values.shape[-1], -(-values.shape[-1] // kind.size)
    made = torch.empty((*values.shape[:-1], blocks, kind.bytes), dtype=torch.uint8, device=values.device)
    rows, target = values.detach().reshape(-1, columns), made.view(-1, blocks, kind.bytes)
    at_once = max(1, _PIECE // max(1, blocks))
    for first in range(0, len(rows), at_once):
        piece = rows[first : first + at_once].float()
        if columns % kind.size:
            piece = torch.nn.functional.pad(piece, (0, -columns % kind.size))
        target[first : first + at_once] = _MAKERS[kind.name](piece.reshape(-1, kind.size)).view(-1, blocks, kind.bytes)
    return made


_PIECE = 1 << 16
"""Blocks that are made at once, or those of one row: several copies of them are held meanwhile, in float32."""
_TRIED = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 1.03, 1.06)
"""Scales of Q4_0, as shares of the one that maps the largest number to a whole step; the first of equally good wins."""


def _to_q8_0(blocks: Tensor) -> Tensor:
    scale = _half(blocks.abs().amax(dim=1, keepdim=True) / 127)
    steps = _steps(blocks, scale).clamp_(-127, 127)
    return torch.cat((_bytes(scale), steps.to(torch.int8).view(torch.uint8)), dim=1)


def _to_q4_0(blocks: Tensor) -> Tensor:
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    best = scale = _half(largest / -8)
    least = torch.full_like(largest, torch.inf)
    for share in _TRIED:
        scale = _half(largest / (-8 * share))
        steps = _steps(blocks, scale).clamp_(-8, 7)
        error = (steps * scale - blocks).square().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    steps = (_steps(blocks, best).clamp_(-8, 7) + 8).to(torch.uint8)
    return torch.cat((_bytes(best), steps[:, :16] | steps[:, 16:] << 4), dim=1)


def _to_bf16(blocks: Tensor) -> Tensor:
    rounded = blocks.bfloat16()
    if not bool(rounded.isfinite().all()):
        raise ConfigError("a weight is no finite number, or too large for bfloat16")
    return rounded.view(torch.uint8)


def _steps(blocks: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, blocks / scale).round_()


def _half(scale: Tensor) -> Tensor:
    """Scales as float16 has them, in float32.

    Raises:
        ConfigError: one that it cannot have.
    """
    rounded = scale.half().float()
    if not bool(rounded.isfinite().all()):
        raise ConfigError("a weight is no finite number, or too large for the float16 scale of its block")
    return rounded


def _bytes(scale: Tensor) -> Tensor:
    return scale.half().view(torch.uint8)


MADE = ("Q8_0", "Q4_0", "BF16")
"""The formats that are made; all others are only read."""
_MAKERS: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0, "BF16": _to_bf16}
