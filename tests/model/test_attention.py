"""Attention, rotary positions and the norm against loops and textbook formulas.

The package computes these in float32 whatever the input, so the tolerances are those of float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finemoe.model.attention.grouped_query import GroupedQueryAttention, GroupedQueryCache, GroupedQueryConfig
from finemoe.model.attention.kernels import ATTENTION_KERNELS
from finemoe.model.norm import RMSNorm
from finemoe.model.rope import rotate, rotation
from oracles import attention as oracle

BATCH, SEQ, DIM = 2, 5, 8
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])


def document_mask() -> Tensor:
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    return same & oracle.causal(BATCH, 1, SEQ)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_kernel_forward_and_gradients(kernel: str, masked: bool, heads: int, kv_heads: int) -> None:
    states = [torch.randn(BATCH, h, SEQ, DIM, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    mask = document_mask() if masked else None
    output = ATTENTION_KERNELS[kernel](*states, mask)
    full = oracle.causal(BATCH, heads, SEQ) if mask is None else mask.expand(BATCH, heads, SEQ, SEQ)
    expected = oracle.attention(*(s.double() for s in states), full)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(output)
    found = torch.autograd.grad((output * direction).sum(), states)
    wanted = torch.autograd.grad((expected * direction).sum(), states)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_kernel_with_fewer_queries_than_keys(kernel: str) -> None:
    query, key, value = (torch.randn(BATCH, 4, n, DIM) for n in (2, SEQ, SEQ))
    mask = torch.rand(BATCH, 1, 2, SEQ) < 0.5
    mask[..., 0] = True
    expected = oracle.attention(query.double(), key.double(), value.double(), mask.expand(BATCH, 4, 2, SEQ))
    found = ATTENTION_KERNELS[kernel](query, key, value, mask).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_module_is_projections_rotation_loops_and_output(kernel: str, kv_heads: int) -> None:
    config = GroupedQueryConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=DIM, rope_theta=500.0)
    module = GroupedQueryAttention(config, 12, ATTENTION_KERNELS[kernel])
    hidden, positions = torch.randn(BATCH, SEQ, 12), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])

    def heads(weight: Tensor) -> Tensor:
        return (hidden @ weight.T).view(BATCH, SEQ, -1, DIM).transpose(1, 2).double()

    query = oracle.rotate(heads(module.q_proj.weight), positions, 500.0)
    key = oracle.rotate(heads(module.k_proj.weight), positions, 500.0)
    mixed = oracle.attention(query, key, heads(module.v_proj.weight), oracle.causal(BATCH, 4, SEQ))
    expected = mixed.transpose(1, 2).flatten(2).float() @ module.o_proj.weight.T
    found = module(hidden, positions=positions, mask=None, cache=None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotation_is_multiplication_by_a_complex_number(theta: float) -> None:
    states = torch.randn(BATCH, 3, SEQ, DIM, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4], [100, 7, 4095, 0, 1]])
    output = rotate(states, *rotation(positions, DIM, theta))
    expected = oracle.rotate(states, positions, theta)
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)  # float32 angles at position 4095
    direction = torch.randn_like(output)
    (found,) = torch.autograd.grad((output * direction).sum(), states)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), states)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_rotated_products_depend_on_the_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)

    def product(at: int, other: int) -> Tensor:
        turned = (rotate(s, *rotation(torch.tensor([[p]]), DIM, 1e4)) for s, p in ((query, at), (key, other)))
        first, second = turned
        return (first * second).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    norm = RMSNorm(6, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(4, 6).to(dtype).requires_grad_()
    wide = hidden.double()
    expected = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-3) * norm.weight.double()
    found = norm(hidden)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(found.square().sum(), hidden)
    (wanted,) = torch.autograd.grad(expected.square().sum(), hidden)
    torch.testing.assert_close(gradient.double(), wanted.double(), rtol=4 * tolerance, atol=4 * tolerance)


def test_cache_refuses_a_position_beyond_its_capacity() -> None:
    cache = GroupedQueryCache(torch.zeros(1, 1, 4, 2))
    states = torch.zeros(1, 1, 1, 2)
    cache.update(states, states, torch.tensor([[3]]))
    with pytest.raises(IndexError, match=r"position 4 .* capacity of 4"):
        cache.update(states, states, torch.tensor([[4]]))


def test_cache_mask_shows_each_row_its_own_past() -> None:
    cache = GroupedQueryCache(torch.zeros(2, 1, 8, 2))
    states = torch.ones(2, 1, 2, 2)
    keys, values, mask = cache.update(states, 2 * states, torch.tensor([[0, 1], [3, 4]]))
    assert keys.shape == values.shape == (2, 1, 5, 2)
    assert mask[0, 0].tolist() == [[True, False, False, False, False], [True, True, False, False, False]]
    assert mask[1, 0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert keys[1, 0, :, 0].tolist() == [0, 0, 0, 1, 1]
    assert values[0, 0, :, 1].tolist() == [2, 2, 0, 0, 0]
