"""Weights of a few bits: blocks of bytes as GGUF files hold them, and what they stand for.

A quantised matrix `[out, in]` is a uint8 tensor `[out, blocks, bytes]`; a stack of them has more in front. The bytes of
a block tell its format, so that such a tensor explains itself, in a model, in a safetensors file and to C++. Rows are
filled up with zeros to whole blocks. Formats: ggml's, as its `ggml-common.h` lays them out; and 32 bfloat16 numbers,
which nothing scales, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.core.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """How the numbers of a block lie in its bytes."""

    name: str
    size: int
    """Numbers in a block."""
    bytes: int
    values: Callable[[Tensor], Tensor]
    """Blocks `[blocks, bytes]` as float32 `[blocks, size]`."""
    halves: tuple[int, ...] = (0,)
    """Where in a block its float16 numbers begin; none of numbers that are bfloat16 themselves."""


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is blocks of bytes."""
    return weight.dtype is torch.uint8


def format_of(weight: Tensor) -> Format:
    """The format of a quantised weight.

    Raises:
        ConfigError: its blocks are of none that is known.
    """
    found = _BY_BYTES.get(weight.shape[-1])
    if found is None:
        known = ", ".join(f"{one.bytes} ({one.name})" for one in FORMATS.values())
        raise ConfigError(f"a quantised weight has blocks of {weight.shape[-1]} bytes; known: {known}")
    return found


def dequantise(weight: Tensor, columns: int) -> Tensor:
    """What a quantised weight `[..., blocks, bytes]` stands for: float32 `[..., columns]`.

    Raises:
        ConfigError: as `format_of`, or its rows are not of so many numbers.
    """
    kind, lead = format_of(weight), weight.shape[:-2]
    if weight.shape[-2] != -(-columns // kind.size):
        raise ConfigError(
            f"rows of {weight.shape[-2]} blocks of {kind.name} are up to {weight.shape[-2] * kind.size} numbers, not "
            f"{columns}"
        )
    values = kind.values(weight.reshape(-1, kind.bytes))
    return values.view(*lead, weight.shape[-2] * kind.size)[..., :columns]


def states_type(weight: Tensor) -> torch.dtype:
    """The type of what a weight is multiplied by: its own, or float32 where it is blocks."""
    return torch.float32 if is_quantised(weight) else weight.dtype


def all_finite(weight: Tensor) -> bool:
    """Whether every number that a quantised weight stands for is one: whether the float16 ones of its blocks are."""
    kind = format_of(weight)
    data = weight.reshape(-1, kind.bytes)
    if not kind.halves:
        return bool(((data.contiguous().view(torch.int16) & _EXPONENT) != _EXPONENT).all())
    return all(bool(_halves(data, first, 1).isfinite().all()) for first in kind.halves)


def in_float32(weight: Tensor, columns: int) -> Tensor:
    """`weight [..., columns]` itself, or what it stands for."""
    return dequantise(weight, columns) if is_quantised(weight) else weight


def _halves(data: Tensor, first: int, count: int) -> Tensor:
    return data[:, first : first + 2 * count].contiguous().view(torch.float16).float()


_EXPONENT = 0x7F80
"""Bits that are all set in a bfloat16 that is no finite number."""


def _bf16(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.bfloat16).float()


def _signed(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int8).float()


def _nibbles(data: Tensor) -> Tensor:
    """`[blocks, n]` bytes as [blocks, 2 n]: low halves before high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1).float()


def _q8_0(data: Tensor) -> Tensor:
    return _halves(data, 0, 1) * _signed(data[:, 2:])


def _q4_0(data: Tensor) -> Tensor:
    return _halves(data, 0, 1) * (_nibbles(data[:, 2:]) - 8)


def _q4_1(data: Tensor) -> Tensor:
    return _halves(data, 0, 1) * _nibbles(data[:, 4:]) + _halves(data, 2, 1)


def _q4_k(data: Tensor) -> Tensor:
    scale, least, sixths = _halves(data, 0, 1), _halves(data, 2, 1), data[:, 4:16]
    near, far, rest = sixths[:, :4], sixths[:, 4:8], sixths[:, 8:]
    scales = torch.cat((near & 63, (rest & 15) | (near >> 6) << 4), dim=1).float()
    minima = torch.cat((far & 63, rest >> 4 | (far >> 6) << 4), dim=1).float()
    steps = _nibbles(data[:, 16:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return (steps * (scale * scales)[..., None] - (least * minima)[..., None]).view(-1, 256)


def _q6_k(data: Tensor) -> Tensor:
    low, high = data[:, :128].reshape(-1, 2, 2, 32), data[:, 128:192].reshape(-1, 2, 1, 32)
    four = torch.cat((low & 15, low >> 4), dim=2)  # [blocks, 2, 4, 32]
    two = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    scales = _halves(data, 208, 1) * _signed(data[:, 192:208])
    steps = (four | two << 4).float() - 32
    return (steps.view(-1, 16, 16) * scales[..., None]).view(-1, 256)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("Q8_0", 32, 34, _q8_0),
        Format("Q4_0", 32, 18, _q4_0),
        Format("Q4_1", 32, 20, _q4_1, (0, 2)),
        Format("Q4_K", 256, 144, _q4_k, (0, 2)),
        Format("Q6_K", 256, 210, _q6_k, (208,)),
        Format("BF16", 32, 64, _bf16, ()),
    )
}
"""By the name that GGUF has for them: those that C++ multiplies by as they are."""
_BY_BYTES = {one.bytes: one for one in FORMATS.values()}
