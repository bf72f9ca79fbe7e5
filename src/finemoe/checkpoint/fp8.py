"""Block-scaled FP8 as DeepSeek-V3 publishes it: E4M3 weights, one fp32 factor for each 128x128 block.

A weight is `E4M3 value * scale_inv of its block`. Pure torch, on the CPU; works through bands of rows, so that beside
input and output it needs some 200 MB.
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
_BAND_ELEMENTS = 1 << 23


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
        result[rows] = weight[rows].float() * _spread(scale_inv[blocks], weight[rows].shape)
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
    factors = torch.empty(scale_shape(weight.shape))
    for rows, blocks in _bands(weight.shape):
        band = weight[rows].float()
        if not torch.isfinite(band).all():
            raise CheckpointError("a weight that is not finite cannot be written as FP8")
        fresh = _fresh_scales(band, power_of_two)
        factor = fresh if scales is None else torch.where(_reproduces(band, scales[blocks]), scales[blocks], fresh)
        quantized[rows] = _divide(band, factor)
        factors[blocks] = factor
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
    height = max(1, _BAND_ELEMENTS // (BLOCK * max(1, shape[1])))
    for first in range(0, -(-shape[0] // BLOCK), height):
        yield slice(first * BLOCK, min((first + height) * BLOCK, shape[0])), slice(first, first + height)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Each block's factor for each of its elements."""
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def _by_block(values: Tensor) -> Tensor:
    """[rows, cols] as [block rows, block cols, 128 * 128], padded with zeros."""
    rows, cols = values.shape
    padded = F.pad(values, (0, -cols % BLOCK, 0, -rows % BLOCK))
    height, width = scale_shape(values.shape)
    return padded.view(height, BLOCK, width, BLOCK).transpose(1, 2).reshape(height, width, BLOCK * BLOCK)


def _fresh_scales(band: Tensor, power_of_two: bool) -> Tensor:
    if band.numel() == 0:
        return torch.empty(scale_shape(band.shape))
    scale = _by_block(band.abs()).amax(-1).clamp(min=_TINY) / E4M3_MAX
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _divide(band: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values of `band`; what is above the range, as after a rounding, becomes the largest value."""
    spread = _spread(scale, band.shape)
    values = torch.where(spread == 0, torch.copysign(torch.zeros(()), band), band / spread)
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _reproduces(band: Tensor, scale: Tensor) -> Tensor:
    """[block rows, block cols] bool: dividing and multiplying again gives the block, in fp32 or rounded to bf16."""
    if band.numel() == 0:
        return torch.ones(scale.shape, dtype=torch.bool)
    back = _divide(band, scale).float() * _spread(scale, band.shape)
    exact, rounded = back == band, back.bfloat16().float() == band
    return _by_block(exact.byte() ^ 1).amax(-1).eq(0) | _by_block(rounded.byte() ^ 1).amax(-1).eq(0)
