"""Blocks of few bits against the package that defines them, and what quantising loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finemoe.core.errors import ConfigError
from finemoe.model.quantised import making
from finemoe.model.quantised.blocks import FORMATS, Format, all_finite, dequantise, format_of
from finemoe.model.quantised.making import quantise

ALL = list(FORMATS.values())
MADE = [FORMATS[name] for name in ("Q8_0", "Q4_0", "BF16")]
SCALED = MADE[:2]


def drawn_blocks(kind: Format, *shape: int) -> Tensor:
    """Any bytes, and scales that are numbers; of bfloat16, numbers."""
    if not kind.halves:
        return torch.randn(*shape, kind.size).bfloat16().view(torch.uint8)
    data = torch.randint(0, 256, (*shape, kind.bytes), dtype=torch.uint8)
    for first in kind.halves:
        data[..., first : first + 2] = torch.randn(*shape, 1).half().view(torch.uint8)
    return data


def by_package(blocks: Tensor) -> Tensor:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format_of(blocks).name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.flatten(-2).numpy(), kind))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_blocks_stand_for_what_the_package_says(kind: Format) -> None:
    torch.manual_seed(0)
    blocks = drawn_blocks(kind, 5, 3)
    assert torch.equal(dequantise(blocks, 3 * kind.size), by_package(blocks))
    stack = drawn_blocks(kind, 2, 5, 3)
    cut = 3 * kind.size - 7
    assert torch.equal(dequantise(stack, cut)[1], by_package(stack[1])[:, :cut])


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 256])
def test_eight_bits_are_within_half_a_step(columns: int) -> None:
    torch.manual_seed(columns)
    values = torch.randn(3, 4, columns)
    values[0, 0] = 0
    found = dequantise(quantise(values, FORMATS["Q8_0"]), columns)
    step = torch.nn.functional.pad(values, (0, -columns % 32)).unflatten(-1, (-1, 32)).abs().amax(-1) / 127
    allowed = (0.5 + 127 * 2**-11) * step.repeat_interleave(32, -1)[..., :columns]  # the scale is rounded, too
    assert bool(((found - values).abs() <= allowed).all())
    assert not found[0, 0].any()


def test_four_bits_lose_less_than_by_the_package() -> None:
    torch.manual_seed(0)
    gguf = pytest.importorskip("gguf")
    values = torch.randn(256, 64)
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
    theirs = torch.from_numpy(gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_0))
    ours = dequantise(quantise(values, FORMATS["Q4_0"]), 64)
    by_block = [(one - values).view(-1, 32).square().sum(1) for one in (ours, theirs)]
    assert bool((by_block[0] <= by_block[1] + 1e-5).all())
    assert by_block[0].mean() < 0.95 * by_block[1].mean()


@pytest.mark.parametrize("kind", SCALED, ids=lambda kind: kind.name)
def test_numbers_that_fit_come_back(kind: Format) -> None:
    """What is a whole step of its block's scale, the largest one at an end."""
    torch.manual_seed(0)
    low, high = (-127, 127) if kind.name == "Q8_0" else (-8, 7)
    steps = torch.randint(low, high + 1, (6, 96)).float()
    steps[:, ::32] = low
    assert torch.equal(dequantise(quantise(0.25 * steps, kind), 96), 0.25 * steps)


@pytest.mark.parametrize("columns", [1, 32, 45, 256])
def test_sixteen_bits_are_torchs_own(columns: int) -> None:
    torch.manual_seed(columns)
    values = torch.randn(3, 4, columns) * 10.0 ** torch.randint(-30, 30, (3, 4, columns))
    blocks = quantise(values, FORMATS["BF16"])
    assert torch.equal(dequantise(blocks, columns), values.bfloat16().float())
    assert torch.equal(quantise(values.bfloat16(), FORMATS["BF16"]), blocks)
    whole = columns - columns % 32
    lying = blocks.flatten(-2)[..., : 2 * columns].contiguous().view(torch.bfloat16)
    assert torch.equal(lying, values.bfloat16())
    assert not blocks[..., whole // 32 :, :].flatten(-2)[..., 2 * (columns - whole) :].any()


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3.4e38])
def test_what_no_block_can_hold_is_refused(kind: Format, wrong: float) -> None:
    values = torch.ones(2, 64)
    values[1, 40] = wrong
    with pytest.raises(ConfigError, match=r"no finite number, or too large for (bfloat16|the float16 scale)"):
        quantise(values, kind)


def test_blocks_of_unknown_bytes_or_of_other_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks of 35 bytes; known: 34 \(Q8_0\), 18 \(Q4_0\)"):
        dequantise(torch.zeros(2, 1, 35, dtype=torch.uint8), 32)
    with pytest.raises(ConfigError, match="rows of 2 blocks of Q8_0 are up to 64 numbers, not 65"):
        dequantise(torch.zeros(2, 2, 34, dtype=torch.uint8), 65)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_scales_that_are_no_numbers_are_seen(kind: Format) -> None:
    blocks = drawn_blocks(kind, 3, 2)
    assert all_finite(blocks)
    half = torch.half if kind.halves else torch.bfloat16
    for first in kind.halves or (0, 30, 62):
        for wrong in (float("inf"), float("-inf"), float("nan")):
            broken = blocks.clone()
            broken[2, 1, first : first + 2] = torch.tensor([wrong]).to(half).view(torch.uint8)
            assert not all_finite(broken)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(3, 50, 96), (150, 33), (7, 300), (0, 64)])
def test_only_a_few_rows_are_float32_at_a_time(
    kind: Format, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tensor holds, in the same bytes as all at once; a row is never cut."""
    torch.manual_seed(0)
    values = torch.randn(shape).bfloat16()
    wanted, held = quantise(values, kind), []
    turned = values.transpose(0, -1).contiguous().transpose(0, -1)  # the same numbers, lying otherwise
    ordinary = making._MAKERS[kind.name]
    monkeypatch.setitem(making._MAKERS, kind.name, lambda blocks: (held.append(blocks.numel()), ordinary(blocks))[1])
    monkeypatch.setattr(making, "_PIECE", 8)
    assert torch.equal(quantise(values, kind), wanted)
    assert torch.equal(quantise(turned, kind), wanted)
    row = -(-shape[-1] // kind.size) * kind.size
    assert max(held, default=0) <= max(8 * kind.size, row)
    assert sum(held) == 2 * row * (values.numel() // shape[-1])
