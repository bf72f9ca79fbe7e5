"""FP8 blocks against loops over single numbers, and bit-exact round trips."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finemoe.checkpoint.huggingface import fp8
from finemoe.checkpoint.huggingface.fp8 import dequantize, quantize, scale_shape
from finemoe.core.errors import CheckpointError

BLOCK = 128
SHAPES = [(1, 1), (128, 128), (130, 7), (256, 300), (127, 129), (3, 512)]


def e4m3(byte: int) -> float:
    """The number that a byte stands for: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = (byte >> 3) & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


VALUES = sorted({e4m3(byte) for byte in range(256) if not math.isnan(e4m3(byte))})


def blocks(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    return [
        (slice(row, row + BLOCK), slice(column, column + BLOCK))
        for row, column in itertools.product(range(0, shape[0], BLOCK), range(0, shape[1], BLOCK))
    ]


def checkpoint(shape: tuple[int, int], seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Any bytes but NaN, and any usable factors, as a published file may hold them."""
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    raw[(raw & 0x7F) == 0x7F] = 0
    return raw.view(torch.float8_e4m3fn), torch.exp(torch.randn(scale_shape(shape), generator=draw) * spread - 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_is_a_product(shape: tuple[int, int]) -> None:
    weight, scale = checkpoint(shape)
    result = dequantize(weight, scale, torch.float32)
    raw = weight.view(torch.uint8)
    for row, column in itertools.product(range(0, shape[0], 17), range(0, shape[1], 13)):
        factor = scale[row // BLOCK, column // BLOCK].item()
        assert result[row, column].item() == torch.tensor(e4m3(int(raw[row, column])) * factor).item()
    assert torch.equal(dequantize(weight, scale), result.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_takes_the_nearest_value(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    quantized, scale = quantize(weight)
    assert quantized.dtype == torch.float8_e4m3fn
    assert scale.shape == (math.ceil(shape[0] / BLOCK), math.ceil(shape[1] / BLOCK))
    for number, (rows, columns) in enumerate(blocks(shape)):
        block, factor = weight[rows, columns], scale.flatten()[number]
        assert factor == block.abs().max() / 448
        got = quantized[rows, columns].float()
        for at in range(0, block.numel(), 97):
            wanted = (block.flatten()[at] / factor).item()
            nearest = min(abs(value - wanted) for value in VALUES)
            assert abs(got.flatten()[at].item() - wanted) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_untouched_checkpoint_comes_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = checkpoint(shape)
    again, factors = quantize(dequantize(weight, scale, dtype), scale)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(factors, scale)


def test_bf16_values_held_as_fp32_come_back_too() -> None:
    weight, scale = checkpoint((200, 200))
    again, factors = quantize(dequantize(weight, scale, torch.bfloat16).float(), scale)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(factors, scale)


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300), st.floats(0, 4), st.booleans())
def test_round_trips_of_drawn_checkpoints(seed: int, rows: int, columns: int, spread: float, wide: bool) -> None:
    weight, scale = checkpoint((rows, columns), seed, spread)
    again, factors = quantize(dequantize(weight, scale, torch.float32 if wide else torch.bfloat16), scale)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(factors, scale)


def test_only_a_trained_block_gets_a_new_factor() -> None:
    weight, scale = checkpoint((256, 256))
    trained = dequantize(weight, scale)
    trained[200, 10] *= 1.05
    again, factors = quantize(trained, scale)
    changed = factors != scale
    assert changed.tolist() == [[False, False], [True, False]]
    assert torch.equal(again.view(torch.uint8)[:128], weight.view(torch.uint8)[:128])
    assert factors[1, 0] == trained[128:, :128].float().abs().max() / 448


@given(st.integers(0, 2**32), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_the_error_is_bounded(seed: int, size: float, power_of_two: bool) -> None:
    weight = torch.randn(150, 140, generator=torch.Generator().manual_seed(seed)) * size
    quantized, scale = quantize(weight, power_of_two=power_of_two)
    error = (dequantize(quantized, scale, torch.float32) - weight).abs()
    spread = scale.repeat_interleave(BLOCK, 0)[:150].repeat_interleave(BLOCK, 1)[:, :140]
    assert (error <= torch.maximum(weight.abs() / 16, spread * 2**-10) * 1.0001).all()


def test_powers_of_two_are_the_next_ones_up() -> None:
    for largest, wanted in ((448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (1.0, 2**-8), (0.0, 2**-22)):
        weight = torch.zeros(4, 4)
        weight[2, 3] = -largest
        assert quantize(weight, power_of_two=True)[1].item() == wanted


def test_a_block_of_zeros_keeps_a_usable_factor() -> None:
    quantized, scale = quantize(torch.zeros(3, 200))
    assert torch.equal(scale, torch.full((1, 2), 1e-4) / 448)
    assert not quantized.float().any()


def test_a_factor_beyond_its_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"need a factor of 2\.23e\+06, and its type, torch\.float16, reaches"):
        quantize(torch.full((5, 5), 1e9), stored=torch.float16)


def test_values_above_the_carried_range_get_a_new_factor_and_never_nan() -> None:
    weight = torch.full((5, 5), 1000.0)
    quantized, scale = quantize(weight, torch.ones(1, 1))
    assert scale.item() == pytest.approx(1000 / 448)
    assert (quantized.float() == 448).all()


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = checkpoint((700, 200))
    whole = dequantize(weight, scale), *quantize(torch.ones(700, 200).cumsum(0), scale)
    monkeypatch.setattr(fp8, "_BAND_ELEMENTS", 1)
    bands = dequantize(weight, scale), *quantize(torch.ones(700, 200).cumsum(0), scale)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, bands, strict=True))


def test_every_byte_is_the_number_it_stands_for() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    wanted = torch.tensor([[e4m3(byte) for byte in range(256)]])
    result = dequantize(every, torch.ones(1, 2), torch.float32)
    assert torch.equal(result.isnan(), wanted.isnan())
    assert torch.equal(result.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(result.signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    quantized, scale = quantize(torch.empty(shape))
    assert quantized.shape == shape
    assert dequantize(quantized, scale).shape == shape
    assert quantize(torch.empty(shape), scale)[0].shape == shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -1e-3])
def test_a_factor_that_is_no_number_above_0_is_refused(bad: float) -> None:
    weight, scale = checkpoint((130, 130))
    scale[1, 0] = bad
    for refused in (lambda: dequantize(weight, scale), lambda: quantize(torch.ones(130, 130), scale)):
        with pytest.raises(CheckpointError, match="is 0 or below" if math.isfinite(bad) else "not finite"):
            refused()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 16), (300, 7)])
def test_factors_of_any_type_for_blocks_of_any_size(stored: torch.dtype, block: tuple[int, int]) -> None:
    shape = (200, 70)
    weight = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = (torch.rand(scale_shape(shape, block)) * 0.5 + 0.1).to(stored)
    wanted = torch.empty(shape)
    for row, column in itertools.product(range(shape[0]), range(shape[1])):
        wanted[row, column] = weight[row, column].float() * scale[row // block[0], column // block[1]].float()
    assert torch.equal(dequantize(weight, scale, torch.float32, block), wanted)
    again, factors = quantize(wanted, scale, block=block, stored=stored)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(factors, scale.float())
    # A new factor is one that can be stored, and large enough: nothing is cut off at 448.
    trained = torch.randn(shape)
    quantized, fresh = quantize(trained, scale, block=block, stored=stored)
    assert torch.equal(fresh.to(stored).float(), fresh)
    back = dequantize(quantized, fresh.to(stored), torch.float32, block)
    largest = fresh.repeat_interleave(block[0], 0)[:200].repeat_interleave(block[1], 1)[:, :70] * 448
    assert (trained.abs() <= largest * (1 + 1e-6)).all()
    assert ((back - trained).abs() <= torch.maximum(trained.abs() / 16, largest / 448 * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(torch.tensor([[1.0, bad]]))


def test_nan_weights_stay_nan_for_the_reader_to_find() -> None:
    weight = torch.tensor([[0x7F, 0xFF]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert dequantize(weight, torch.ones(1, 1)).isnan().all()


@pytest.mark.parametrize(
    ("weight", "scale", "reason"),
    [
        (torch.zeros(3), torch.ones(1), "for matrices"),
        (torch.zeros(2, 3, 4), torch.ones(1, 1), "for matrices"),
        (torch.zeros(129, 4), torch.ones(1, 1), r"factors of \[2, 1\]"),
        (torch.zeros(4, 4), torch.ones(1, 1, dtype=torch.float64), "F32, BF16, F16 or F8_E8M0"),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, scale: Tensor, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        dequantize(weight.to(torch.float8_e4m3fn), scale)
    with pytest.raises(CheckpointError, match=reason):
        quantize(weight, scale)


def test_only_e4m3_is_dequantised() -> None:
    with pytest.raises(CheckpointError, match="not an FP8 E4M3 weight"):
        dequantize(torch.zeros(1, 1).to(torch.float8_e5m2), torch.ones(1, 1))
