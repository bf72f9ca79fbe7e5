"""Attention kernels, grouped-query attention and the norm against loops and textbook formulas.

The package computes these in float32 whatever the input, so the tolerances are those of float32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.attention.grouped_query import GroupedQueryAttention, GroupedQueryCache, GroupedQueryConfig
from finemoe.model.attention.places import Places, within_documents
from finemoe.model.backend import Attend
from finemoe.model.backends import ATTENTION_KERNELS, NATIVE, backend_for
from finemoe.model.config import Kernels
from finemoe.model.norm import RMSNorm
from finemoe.model.rope import RopeConfig
from finemoe.model.spans import Mask
from oracles import attention as oracle
from oracles import rope
from oracles.models import YARN

BATCH, SEQ, DIM = 2, 5, 8
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])


def document_mask() -> Tensor:
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    return same & oracle.causal(BATCH, 1, SEQ)


KERNELS: dict[str, Attend] = {**ATTENTION_KERNELS, "native": NATIVE.attend}
MASKS: dict[str, Mask] = {"causal": None, "documents": document_mask(), "spans": within_documents(DOCUMENTS)}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_kernel_forward_and_gradients(kernel: str, mask: Mask, heads: int, kv_heads: int) -> None:
    states = [torch.randn(BATCH, h, SEQ, DIM, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    output = KERNELS[kernel](*states, mask, 0.7)
    full = oracle.causal(BATCH, heads, SEQ) if mask is None else document_mask().expand(BATCH, heads, SEQ, SEQ)
    expected = oracle.attention(*(s.double() for s in states), full, 0.7)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(output)
    found = torch.autograd.grad((output * direction).sum(), states)
    wanted = torch.autograd.grad((expected * direction).sum(), states)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_with_fewer_queries_than_keys(kernel: str) -> None:
    query, key, value = (torch.randn(BATCH, 4, n, DIM) for n in (2, SEQ, SEQ))
    mask = torch.rand(BATCH, 1, 2, SEQ) < 0.5
    mask[..., 0] = True
    expected = oracle.attention(query.double(), key.double(), value.double(), mask.expand(BATCH, 4, 2, SEQ))
    found = KERNELS[kernel](query, key, value, mask, 1 / math.sqrt(DIM)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_with_values_narrower_than_keys(kernel: str) -> None:
    query, key = torch.randn(BATCH, 4, SEQ, DIM), torch.randn(BATCH, 2, SEQ, DIM)
    value = torch.randn(BATCH, 2, SEQ, 3)
    expected = oracle.attention(query.double(), key.double(), value.double(), oracle.causal(BATCH, 4, SEQ), 0.3)
    found = KERNELS[kernel](query, key, value, None, 0.3)
    assert found.shape == (BATCH, 4, SEQ, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


MODULES: dict[str, dict[str, Any]] = {
    "MHA": {"num_kv_heads": 4},
    "GQA": {"num_kv_heads": 2},
    "MQA": {"num_kv_heads": 1},
    "biases": {"num_kv_heads": 2, "qkv_bias": True},
    "norm of each head": {"num_kv_heads": 2, "qk_norm": "head"},
    "norm of the projection": {"num_kv_heads": 2, "qk_norm": "projection", "qkv_bias": True},
    "interleaved": {"num_kv_heads": 2, "rope": {"theta": 500.0, "layout": "interleaved"}},
    "YaRN": {"num_kv_heads": 2, "rope": {"theta": 500.0, "scaling": YARN}},
    "half of each head": {"num_kv_heads": 2, "rotary_dim": 4},
    "a pair, interleaved": {"num_kv_heads": 2, "rotary_dim": 2, "rope": {"theta": 500.0, "layout": "interleaved"}},
    "half, normed, YaRN": {
        **{"num_kv_heads": 2, "rotary_dim": 4, "qk_norm": "head", "qkv_bias": True},
        "rope": {"theta": 500.0, "scaling": YARN},
    },
}
POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])


def expected_output(module: GroupedQueryAttention, hidden: Tensor) -> Tensor:
    """Projections, biases, norms, complex rotation, loops and output, each as its formula, in double precision."""
    config, weights = module.config, {name: value.double() for name, value in module.named_parameters()}

    def projected(name: str) -> Tensor:
        states = hidden.double() @ weights[f"{name}_proj.weight"].T
        states = states + weights[f"{name}_proj.bias"] if config.qkv_bias else states
        scale = weights.get(f"{name}_norm.weight")
        if config.qk_norm == "projection" and scale is not None:
            states = oracle.norm(states, scale, 1e-3)
        heads = states.view(BATCH, SEQ, -1, DIM).transpose(1, 2)
        return oracle.norm(heads, scale, 1e-3) if config.qk_norm == "head" and scale is not None else heads

    scaling, theta = config.rope.scaling, config.rope.theta
    turning = config.rotary_dim or DIM
    frequencies, scale = rope.plain(turning, theta), 1 / math.sqrt(DIM)
    if scaling is not None:
        frequencies = rope.yarn(turning, theta, scaling.factor, scaling.original_max_positions, scaling.beta_fast)
        scale *= (0.1 * math.log(scaling.factor) + 1) ** 2

    def turned(name: str) -> Tensor:
        states = projected(name)
        first = rope.rotate(states[..., :turning], POSITIONS, frequencies, config.rope.layout)
        return torch.cat((first, states[..., turning:]), -1)

    query, key = turned("q"), turned("k")
    mixed = oracle.attention(query, key, projected("v"), oracle.causal(BATCH, 4, SEQ), scale)
    return mixed.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("changes", MODULES.values(), ids=MODULES)
def test_module_is_projections_rotation_loops_and_output(changes: dict[str, Any], kernel: str) -> None:
    fields = {"num_heads": 4, "head_dim": DIM, "rope": {"theta": 500.0}, **changes}
    module = GroupedQueryAttention(
        GroupedQueryConfig.model_validate(fields), 12, 1e-3, backend_for(Kernels.model_validate({"attention": kernel}))
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hidden = torch.randn(BATCH, SEQ, 12, requires_grad=True)
    found, expected = module(hidden, places=Places(POSITIONS), cache=None), expected_output(module, hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(found)
    leaves = {"hidden": hidden, **dict(module.named_parameters())}
    gradients = torch.autograd.grad((found * direction).sum(), list(leaves.values()))
    wanted = torch.autograd.grad((expected * direction).sum(), list(leaves.values()))
    for name, gradient, want in zip(leaves, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("dim", "message"), [(8, "leave it out"), (9, "leave it out"), (3, "odd"), (0, "greater than")]
)
def test_impossible_rotary_dims_are_refused(dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedQueryConfig(num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    norm = RMSNorm(6, 1e-3, NATIVE)
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


def test_spans_of_documents_are_their_mask() -> None:
    assert torch.equal(within_documents(DOCUMENTS).mask, document_mask())


def test_places_share_a_rotation_by_value() -> None:
    places = Places(POSITIONS)
    first = places.rotation(DIM, RopeConfig(theta=500.0))
    assert places.rotation(DIM, RopeConfig(theta=500.0)) is first
    assert not torch.equal(places.rotation(DIM, RopeConfig(theta=501.0))[1], first[1])
    assert places.rotation(DIM - 2, RopeConfig(theta=500.0))[0].shape == (BATCH, SEQ, DIM // 2 - 1)


def test_places_cut_short_are_those_of_the_first_tokens() -> None:
    cut = Places(POSITIONS, within_documents(DOCUMENTS)).cut(3)
    assert torch.equal(cut.positions, POSITIONS[:, :3])
    assert torch.equal(cut.mask.mask, document_mask()[:, :, :3, :3])
    assert torch.equal(Places(POSITIONS, document_mask()).cut(3).mask, document_mask()[:, :, :3, :3])


def empty_cache(batch: int, capacity: int) -> GroupedQueryCache:
    return GroupedQueryCache(*torch.zeros(2, batch, 1, capacity, 2))


def test_cache_refuses_a_position_beyond_its_capacity() -> None:
    cache, states = empty_cache(1, 4), torch.zeros(1, 1, 1, 2)
    cache.update(states, states, Places(torch.tensor([[3]])))
    with pytest.raises(IndexError, match=r"position 4 .* capacity of 4"):
        cache.update(states, states, Places(torch.tensor([[4]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["native", "torch"])
def test_cache_shows_each_row_its_own_past(dtype: torch.dtype) -> None:
    cache, states = empty_cache(2, 8), torch.ones(2, 1, 2, 2, dtype=dtype)
    keys, values, seen = cache.update(states, 2 * states, Places(torch.tensor([[0, 1], [3, 4]])))
    assert keys.shape == values.shape == (2, 1, 5, 2)
    assert keys.dtype == values.dtype == dtype
    assert seen.mask[0, 0].tolist() == [[True, False, False, False, False], [True, True, False, False, False]]
    assert seen.mask[1, 0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert keys[1, 0, :, 0].tolist() == [0, 0, 0, 1, 1]
    assert values[0, 0, :, 1].tolist() == [2, 2, 0, 0, 0]


def test_rows_of_a_cache_are_its_memory_and_can_change_places() -> None:
    cache, states = empty_cache(3, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
    cache.rows(1, 3).update(states, 10 * states, Places(torch.tensor([[0], [1]])))
    assert cache.keys[:, 0, :, 0].tolist() == [[0, 0], [1, 0], [0, 2]]
    assert cache.values[:, 0, :, 1].tolist() == [[0, 0], [10, 0], [0, 20]]
    cache.swap(0, 2)
    assert cache.keys[:, 0, :, 0].tolist() == [[0, 2], [1, 0], [0, 0]]
    assert cache.values[:, 0, :, 1].tolist() == [[0, 20], [10, 0], [0, 0]]
