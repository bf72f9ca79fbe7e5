"""Block-scaled FP8 as DeepSeek-V3 publishes it: E4M3 weights, one fp32 factor for each 128x128 block.

A weight is `E4M3 value * scale_inv of its block`. Pure torch, on the CPU; works through bands of rows, so that beside
input and output it needs little.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.core.errors import CheckpointError

BLOCK = 128
E4M3_MAX = 448.0
_TINY = 1e-4  # smallest absmax of a block, as in DeepSeek-V3's own kernel: a block of zeros keeps a usable factor
_BAND_ELEMENTS = 1 << 20


def scale_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Shape of the `weight_scale_inv` of a weight: one factor a block, the ragged last ones included.

    Raises:
        CheckpointError: the weight is not a matrix.
    """
    if len(shape) != 2:
        raise CheckpointError(f"FP8 blocks are for matrices, but the weight has shape {list(shape)}")
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantize(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`weight` float8_e4m3fn [rows, cols] times `scale_inv` fp32 [ceil(rows/128), ceil(cols/128)], in `dtype`.

    Computed in fp32 and rounded once.

    Raises:
        CheckpointError: shapes that do not fit, or a factor that is not finite.
    """
    _check_scales(weight, scale_inv)
    if weight.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"not an FP8 E4M3 weight: {weight.dtype}")
    result = torch.empty(weight.shape, dtype=dtype)
    for rows, blocks in _bands(weight.shape):
        values = _blocks(_values(weight[rows]))
        result[rows] = _flat(values.mul_(_spread(scale_inv[blocks])), weight[rows].shape)
    return result


def quantize(weight: Tensor, scales: Tensor | None = None, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`weight` [rows, cols] as float8_e4m3fn and its fp32 `scale_inv`.

    A new factor is max(absmax of the block, 1e-4) / 448. Where the block, read back with its factor in `scales`, is the
    given one to the bit (as it is, or rounded to bf16), that factor stays: an untouched checkpoint comes back as it
    was, a trained one gets new factors.

    Args:
        weight: any float dtype.
        scales: the factors that the checkpoint came with.
        power_of_two: round new factors up to powers of two (`scale_fmt` "ue8m0").

    Raises:
        CheckpointError: not a matrix, not finite, or factors that do not fit.
    """
    if scales is not None:
        _check_scales(weight, scales)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    factors = torch.full(scale_shape(weight.shape), _TINY / E4M3_MAX)
    for rows, blocks in _bands(weight.shape):
        band = _blocks(weight[rows].float())
        if not all(torch.isfinite(bound) for bound in torch.aminmax(band)):
            raise CheckpointError("a weight that is not finite cannot be written as FP8")
        old = None if scales is None else scales[blocks]
        values, factors[blocks] = _quantized(band, old, power_of_two)
        quantized[rows] = _flat(values, weight[rows].shape)
    return quantized, factors


def _check_scales(weight: Tensor, scale_inv: Tensor) -> None:
    wanted = scale_shape(weight.shape)
    if scale_inv.shape != wanted or scale_inv.dtype != torch.float32:
        raise CheckpointError(
            f"a weight of {list(weight.shape)} needs fp32 factors of {list(wanted)}, not {scale_inv.dtype} of "
            f"{list(scale_inv.shape)}"
        )
    if not torch.isfinite(scale_inv).all():
        raise CheckpointError("a block's factor (`weight_scale_inv`) is not finite")


def _bands(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Rows, and rows of blocks, in bands of about `_BAND_ELEMENTS`."""
    if not shape[1]:
        return
    height = max(1, _BAND_ELEMENTS // (BLOCK * shape[1]))
    for first in range(0, -(-shape[0] // BLOCK), height):
        yield slice(first * BLOCK, min((first + height) * BLOCK, shape[0])), slice(first, first + height)


def _blocks(values: Tensor) -> Tensor:
    """[rows, cols] as [block rows, 128, block cols, 128], padded with zeros where the edge is ragged."""
    rows, cols = values.shape
    if rows % BLOCK or cols % BLOCK:
        values = F.pad(values, (0, -cols % BLOCK, 0, -rows % BLOCK))
    height, width = scale_shape(values.shape)
    return values.view(height, BLOCK, width, BLOCK)


def _flat(values: Tensor, shape: torch.Size) -> Tensor:
    """`_blocks` undone."""
    height, _, width, _ = values.shape
    return values.reshape(height * BLOCK, width * BLOCK)[: shape[0], : shape[1]]


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


def _quantized(band: Tensor, old: Tensor | None, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """E4M3 values and factors of a band of blocks; `old` factors stay where they give the block back."""
    if old is None:
        factors = _fresh_factors(band, power_of_two)
        return _divide(band, factors), factors
    values = _divide(band, old)
    changed = _changed(band, _values(values).mul_(_spread(old)))
    if not changed.any():
        return values, old
    factors = torch.where(changed, _fresh_factors(band, power_of_two), old)
    return _divide(band, factors), factors


def _changed(band: Tensor, back: Tensor) -> Tensor:
    """[block rows, block cols] bool: `back` is not the block, neither in fp32 nor rounded to bf16."""
    return _any(back.bfloat16().float() != band) & _any(back != band)


def _fresh_factors(band: Tensor, power_of_two: bool) -> Tensor:
    scale = band.abs().amax(3).amax(1).clamp(min=_TINY) / E4M3_MAX
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _divide(band: Tensor, factors: Tensor) -> Tensor:
    """E4M3 values of `band`; what is above the range, as after a rounding, becomes the largest value."""
    values = band / _spread(factors)
    if (factors == 0).any():  # 0 / 0; the sign of a zero stays
        values = torch.where(_spread(factors) == 0, torch.copysign(torch.zeros(()), band), values)
    return values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
