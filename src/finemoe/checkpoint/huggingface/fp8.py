"""Block-scaled FP8 as DeepSeek-V3 publishes it: E4M3 weights, and a factor for each block of 128x128 or other size.

A weight is `E4M3 value * scale_inv of its block`. Factors are fp32 in DeepSeek's files, bf16 in Qwen's, and elsewhere
powers of two of eight bits (E8M0); each is exactly a number in fp32, in which everything is computed. Pure torch, on
the CPU; works through bands of rows, so that beside input and output it needs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.core.errors import CheckpointError

Block = tuple[int, int]
"""Rows and columns that share a factor."""
BLOCK: Block = (128, 128)
"""Where nobody says another."""
FACTOR_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
"""What factors may be stored as."""
_MAX_BLOCK = 1 << 16
E4M3_MAX = 448.0
_TINY = 1e-4  # smallest absmax of a block, as in DeepSeek-V3's own kernel: a block of zeros keeps a usable factor
_BAND_ELEMENTS = 1 << 20


def block_of(raw: Mapping[str, Any]) -> Block:
    """The block size that a config.json gives, or the usual one.

    Raises:
        CheckpointError: what it gives is none.
    """
    settings = raw.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, Mapping) else None
    if size is None:
        return BLOCK
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= _MAX_BLOCK for n in size):
        raise CheckpointError(
            f"config.json: `quantization_config.weight_block_size` is {size!r}; two whole numbers are needed, rows and "
            "columns of a block"
        )
    return size[0], size[1]


def scale_shape(shape: tuple[int, ...] | torch.Size, block: Block = BLOCK) -> tuple[int, int]:
    """Shape of the `weight_scale_inv` of a weight: one factor a block, the ragged last ones included.

    Raises:
        CheckpointError: the weight is not a matrix.
    """
    if len(shape) != 2:
        raise CheckpointError(f"FP8 blocks are for matrices, but the weight has shape {list(shape)}")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def factors_of(scale_inv: Tensor, row: int, rows: int, block: Block = BLOCK) -> Tensor:
    """The factors of `rows` rows of a weight from `row` on, which begins a block."""
    first = row // block[0]
    return scale_inv[first : first - (-rows // block[0])]


def dequantize(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16, block: Block = BLOCK) -> Tensor:
    """`weight` float8_e4m3fn [rows, cols] times its `scale_inv`, one of FACTOR_TYPES, in `dtype`.

    Computed in fp32 and rounded once.

    Raises:
        CheckpointError: shapes that do not fit, or a factor that is not a number above 0.
    """
    factors = _checked(weight, scale_inv, block)
    if weight.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"not an FP8 E4M3 weight: {weight.dtype}")
    result = torch.empty(weight.shape, dtype=dtype)
    for rows, blocks in _bands(weight.shape, block):
        values = _blocks(_values(weight[rows]), block)
        result[rows] = _flat(values.mul_(_spread(factors[blocks])), weight[rows].shape)
    return result


def quantize(
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    power_of_two: bool = False,
    block: Block = BLOCK,
    stored: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`weight` [rows, cols] as float8_e4m3fn and its `scale_inv`, in fp32 and exact in `stored`.

    A new factor is max(absmax of the block, 1e-4) / 448, rounded up where `stored` cannot hold it. Where the block,
    read back with its factor in `scales`, is the given one to the bit (as it is, or rounded to bf16), that factor
    stays: an untouched checkpoint comes back as it was, a trained one gets new factors.

    Args:
        weight: any float dtype.
        scales: the factors that the checkpoint came with.
        power_of_two: round new factors up to powers of two (`scale_fmt` "ue8m0").
        block: rows and columns that share a factor.
        stored: what the factors are stored as, one of FACTOR_TYPES.

    Raises:
        CheckpointError: not a matrix, not finite, factors that do not fit, or beyond the range of `stored`.
    """
    old = None if scales is None else _checked(weight, scales, block)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    factors = torch.full(scale_shape(weight.shape, block), _TINY / E4M3_MAX)
    stored = torch.float8_e8m0fnu if power_of_two else stored
    for rows, blocks in _bands(weight.shape, block):
        band = _blocks(weight[rows].float(), block)
        if not all(torch.isfinite(bound) for bound in torch.aminmax(band)):
            raise CheckpointError("a weight that is not finite cannot be written as FP8")
        values, factors[blocks] = _quantized(band, None if old is None else old[blocks], stored)
        quantized[rows] = _flat(values, weight[rows].shape)
    return quantized, factors


def _checked(weight: Tensor, scale_inv: Tensor, block: Block) -> Tensor:
    """The factors of `weight` in fp32."""
    wanted = scale_shape(weight.shape, block)
    if scale_inv.shape != wanted or scale_inv.dtype not in FACTOR_TYPES:
        raise CheckpointError(
            f"a weight of {list(weight.shape)} needs factors of {list(wanted)} in F32, BF16, F16 or F8_E8M0, not "
            f"{scale_inv.dtype} of {list(scale_inv.shape)}"
        )
    factors = scale_inv.float()
    if not torch.isfinite(factors).all():
        raise CheckpointError("a block's factor (`weight_scale_inv`) is not finite")
    if not (factors > 0).all():
        raise CheckpointError("a block's factor (`weight_scale_inv`) is 0 or below, which no scale of weights is")
    return factors


def _bands(shape: torch.Size, block: Block) -> Iterator[tuple[slice, slice]]:
    """Rows, and rows of blocks, in bands of about `_BAND_ELEMENTS`."""
    if not shape[1]:
        return
    height = max(1, _BAND_ELEMENTS // (block[0] * shape[1]))
    for first in range(0, -(-shape[0] // block[0]), height):
        yield slice(first * block[0], min((first + height) * block[0], shape[0])), slice(first, first + height)


def _blocks(values: Tensor, block: Block) -> Tensor:
    """[rows, cols] as [block rows, rows, block cols, cols], padded with zeros where the edge is ragged."""
    rows, cols = values.shape
    if rows % block[0] or cols % block[1]:
        values = F.pad(values, (0, -cols % block[1], 0, -rows % block[0]))
    height, width = scale_shape(values.shape, block)
    return values.view(height, block[0], width, block[1])


def _flat(values: Tensor, shape: torch.Size) -> Tensor:
    """`_blocks` undone."""
    height, rows, width, cols = values.shape
    return values.reshape(height * rows, width * cols)[: shape[0], : shape[1]]


def _spread(scale: Tensor) -> Tensor:
    return scale[:, None, :, None]


def _any(flags: Tensor) -> Tensor:
    """[block rows, block cols] bool: one of the block's elements."""
    return flags.view(torch.uint8).amax(3).amax(1) > 0


def _values(weight: Tensor) -> Tensor:
    """E4M3 as fp32.

    The bits of a number, moved, are those of an fp16 number 256 times smaller; so taken it is three times faster than
    torch's own conversion. Only NaN is another number then.
    """
    raw = weight.contiguous().view(torch.uint8)
    bits = raw.to(torch.int16)
    values = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).view(torch.float16).float().mul_(256)
    nan = (raw & 0x7F) == 0x7F
    return values.masked_fill_(nan, torch.nan) if nan.any() else values


def _quantized(band: Tensor, old: Tensor | None, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """E4M3 values and factors of a band of blocks; `old` factors stay where they give the block back."""
    if old is None:
        factors = _fresh_factors(band, stored)
        return _divide(band, factors), factors
    values = _divide(band, old)
    changed = _changed(band, _values(values).mul_(_spread(old)))
    if not changed.any():
        return values, old
    factors = torch.where(changed, _fresh_factors(band, stored), old)
    return _divide(band, factors), factors


def _changed(band: Tensor, back: Tensor) -> Tensor:
    """[block rows, block cols] bool: `back` is not the block, neither in fp32 nor rounded to bf16."""
    return _any(back.bfloat16().float() != band) & _any(back != band)


def _fresh_factors(band: Tensor, stored: torch.dtype) -> Tensor:
    """In fp32, and never smaller than what covers the block."""
    scale = band.abs().amax(3).amax(1).clamp(min=_TINY) / E4M3_MAX
    if stored == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return torch.ldexp(torch.ones_like(scale), exponent)
    if scale.numel() and (largest := float(scale.max())) > torch.finfo(stored).max:
        raise CheckpointError(
            f"a block's values need a factor of {largest:.3g}, and its type, {stored}, reaches "
            f"{torch.finfo(stored).max:.3g}: export without FP8"
        )
    rounded = scale.to(stored)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, above, rounded).float()


def _divide(band: Tensor, factors: Tensor) -> Tensor:
    """E4M3 values of `band`; what is above the range, as after a rounding, becomes the largest value."""
    return (band / _spread(factors)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
