"""SwiGLU with and without DeepSeek-V4's clamp: dense layer, shared experts and both expert kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from finemoe.model.backends import EXPERT_KERNELS, NATIVE, backend_for
from finemoe.model.config import Kernels
from finemoe.model.feed_forward import SwiGLU, swiglu
from finemoe.model.moe.experts import GroupedExperts
from oracles import moe as oracle

LIMITS = [None, 0.5, 100.0]


def grown(*shape: int) -> Tensor:
    """Values well beyond the limit, on both sides."""
    return (torch.randn(*shape, dtype=torch.float64) * 2).requires_grad_()


def test_clamp_bounds_the_gate_from_above_and_the_linear_part_on_both_sides() -> None:
    gate, up = torch.tensor([-50.0, 50.0, 50.0, 1.0]), torch.tensor([50.0, -50.0, 50.0, 1.0])
    silu = [x / (1 + math.exp(-x)) for x in (-50.0, 10.0, 10.0, 1.0)]
    expected = torch.tensor([s * u for s, u in zip(silu, (10.0, -10.0, 10.0, 1.0), strict=True)])
    torch.testing.assert_close(swiglu(gate, up, 10.0), expected)


@pytest.mark.parametrize("limit", LIMITS)
def test_dense_layer_is_the_formula(limit: float | None) -> None:
    layer = SwiGLU(5, 7, NATIVE, limit).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    hidden = grown(2, 3, 5)
    weights = (layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight)
    output, expected = layer(hidden), oracle.swiglu(hidden, *weights, limit or math.inf)
    torch.testing.assert_close(output, expected)
    direction, leaves = torch.randn_like(output), (hidden, *weights)
    found = torch.autograd.grad((output * direction).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * direction).sum(), leaves))


def stacked(num_experts: int, hidden: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    return grown(num_experts, 2 * width, hidden), grown(num_experts, hidden, width)


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("limit", LIMITS)
def test_expert_kernels_are_the_formula_expert_by_expert(limit: float | None, kernel: str) -> None:
    rows, (gate_up, down), counts = grown(9, 3), stacked(4), [3, 0, 5, 1]
    output = EXPERT_KERNELS[kernel](rows, torch.tensor(counts), gate_up, down, limit)
    experts = oracle.unstack(gate_up, down)
    parts = zip(rows.split(counts), experts, strict=True)
    expected = torch.cat([oracle.swiglu(x, *weights, limit or math.inf) for x, weights in parts])
    torch.testing.assert_close(output, expected)
    direction, leaves = torch.randn_like(output), (rows, gate_up, down)
    found = torch.autograd.grad((output * direction).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * direction).sum(), leaves))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("counts", [[2, 1, 3], [0, 6, 0]])
def test_gradcheck_with_values_beyond_the_limit(counts: list[int], kernel: str) -> None:
    rows, weights = grown(6, 3), stacked(3)
    gate, up = (rows @ weights[0][1].T).chunk(2, dim=-1)
    assert (gate > 0.5).any()
    assert (up.abs() > 0.5).any()
    assert gradcheck(lambda *x: EXPERT_KERNELS[kernel](x[0], torch.tensor(counts), *x[1:], 0.5), (rows, *weights))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_grouped_experts_hand_their_limit_to_the_kernel(kernel: str) -> None:
    backend = backend_for(Kernels.model_validate({"experts": kernel}))
    limited, free = (GroupedExperts(2, 3, 4, backend, limit).double() for limit in (0.3, None))
    for parameter in limited.parameters():
        torch.nn.init.normal_(parameter)
    free.load_state_dict(limited.state_dict())
    rows, counts = grown(5, 3), torch.tensor([2, 3])
    assert not torch.allclose(limited(rows, counts), free(rows, counts))
    expected = EXPERT_KERNELS[kernel](rows, counts, limited.gate_up_proj, limited.down_proj, 0.3)
    assert torch.equal(limited(rows, counts), expected)
