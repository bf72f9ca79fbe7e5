"""C++ products by blocks of few bits: those by the float32 weights that they stand for, to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finemoe.model import native
from finemoe.model.backends import NATIVE, TORCH
from finemoe.model.native.experts import experts
from finemoe.model.native.linear import linear
from finemoe.model.quantised.blocks import Format, dequantise
from finemoe.model.quantised.making import quantise
from model.test_quantised import ALL, MADE, drawn_blocks

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")


def weights(kind: Format, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Blocks, and what they stand for."""
    blocks = drawn_blocks(kind, rows, -(-columns // kind.size))
    return blocks, dequantise(blocks, columns).contiguous()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (7, 33), (33, 100), (70, 256), (130, 600), (9, 800)])
def test_products_are_those_by_what_the_blocks_stand_for(kind: Format, out: int, columns: int) -> None:
    torch.manual_seed(out)
    blocks, plain = weights(kind, out, columns)
    for rows in (1, 2, 3, 7, 16, 63, 64, 70):
        states = torch.randn(rows, columns)
        assert torch.equal(linear(states, blocks), linear(states, plain)), rows


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [1, 5, 40, 200])
def test_experts_are_those_by_what_the_blocks_stand_for(kind: Format, tokens: int) -> None:
    """Widths that are no whole blocks, and experts that no token chose."""
    torch.manual_seed(tokens)
    hidden, width, count, k = 72, 44, 7, 2
    gate_up, down = torch.randn(count, 2 * width, hidden), torch.randn(count, hidden, width)
    small = quantise(gate_up, kind), quantise(down, kind)
    plain = dequantise(small[0], hidden).contiguous(), dequantise(small[1], width).contiguous()
    chosen = torch.stack([torch.randperm(count - 2)[:k] for _ in range(tokens)])  # never the last two
    order = chosen.reshape(-1).argsort(stable=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order))
    counts = torch.bincount(chosen.reshape(-1), minlength=count)
    states, gates = torch.randn(tokens, hidden), torch.rand(tokens, k)
    found = experts(states, order, slots, counts, gates, *small, None)
    assert torch.equal(found, experts(states, order, slots, counts, gates, *plain, None))


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
def test_threads_change_no_bit(kind: Format) -> None:
    torch.manual_seed(0)
    blocks, _ = weights(kind, 300, 96)
    before = torch.get_num_threads()
    try:
        for rows in (1, 5, 80):
            states, found = torch.randn(rows, 96), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(linear(states, blocks))
            assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_what_is_no_number_passes_on_as_in_torch(kind: Format, rows: int) -> None:
    torch.manual_seed(0)
    blocks, plain = weights(kind, 6, 64)
    states = torch.randn(rows, 64)
    states[0, 3], states[-1, 40] = math.nan, math.inf
    found, expected = linear(states, blocks), states @ plain.t()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_plain_torch_is_the_oracle(kind: Format) -> None:
    torch.manual_seed(0)
    blocks, plain = weights(kind, 24, 96)
    states, bias = torch.randn(5, 96), torch.randn(24)
    assert torch.equal(TORCH.linear(states, blocks, bias), torch.nn.functional.linear(states, plain, bias))
    exact = states.double() @ plain.double().t() + bias
    allowed = 1e-6 * (states.abs() @ plain.abs().t() + bias.abs())
    assert bool(((NATIVE.linear(states, blocks, bias) - exact).abs() <= allowed).all())
    half = TORCH.linear(states.bfloat16(), blocks, bias.bfloat16())
    assert half.dtype is torch.bfloat16


def test_blocks_that_do_not_fit_are_refused() -> None:
    states, out = torch.randn(2, 64), torch.empty(2, 3)
    for blocks, said in (
        (torch.zeros(3, 2, 35, dtype=torch.uint8), "blocks of 35 bytes"),
        (torch.zeros(3, 3, 34, dtype=torch.uint8), "rows of 64 numbers"),
        (torch.zeros(4, 2, 34, dtype=torch.uint8), "4 where 3 are wanted"),
        (torch.zeros(3, 68, dtype=torch.uint8), "float32, or blocks of bytes"),
        (torch.zeros(3, 34, 2, dtype=torch.uint8).transpose(1, 2), "contiguous in its last dimensions"),
    ):
        with pytest.raises(RuntimeError, match=said):
            torch.ops.finemoe.linear_forward(states, blocks, out)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
def test_gradients_flow_back_through_blocks(kind: Format) -> None:
    """Blocks themselves learn nothing; what comes before them may."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 64, 40), torch.randn(3, 40, 32)
    small = quantise(gate_up, kind), quantise(down, kind)
    plain = dequantise(small[0], 40).contiguous(), dequantise(small[1], 32).contiguous()
    counts = torch.tensor([4, 0, 2])
    gradients = []
    for pair in (small, plain):
        states = torch.linspace(-1, 1, 240).view(6, 40).requires_grad_()
        out = NATIVE.experts(NATIVE.linear(states, pair[0][0][:40], None), counts, *pair, None)
        gradients.append(torch.autograd.grad(out.square().sum(), states)[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
