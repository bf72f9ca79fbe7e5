"""Whole attention layers in one call, a few tokens at a time, against the same layers step by step in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model import native
from finemoe.model.attention.grouped_query import GroupedQueryAttention, GroupedQueryConfig
from finemoe.model.attention.latent import LatentAttention, LatentConfig
from finemoe.model.attention.places import Places
from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH, backend_for
from finemoe.model.config import Kernels
from finemoe.model.native.decode import MOST_TOKENS
from oracles.models import LATENT, YARN

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

HIDDEN, CAPACITY = 24, 300
GROUPED: dict[str, dict[str, Any]] = {
    "GQA": {"num_kv_heads": 2},
    "MHA": {"num_kv_heads": 4},
    "MQA, interleaved": {"num_kv_heads": 1, "rope": {"layout": "interleaved", "scaling": YARN}},
    "biases": {"num_kv_heads": 2, "qkv_bias": True},
    "norm of each head": {"num_kv_heads": 2, "qk_norm": "head"},
    "half of each head": {"num_kv_heads": 2, "rotary_dim": 4},
    "a pair of each head, biases": {"num_kv_heads": 2, "rotary_dim": 2, "qkv_bias": True, "qk_norm": "head"},
    "norm of the projection": {"num_kv_heads": 2, "qk_norm": "projection", "qkv_bias": True},
}
LATENTS: dict[str, dict[str, Any]] = {
    "all on": {},
    "plain queries": {"q_lora_rank": None},
    "half-split": {"rope": {"layout": "half_split"}},
    "wide latents": {"kv_lora_rank": 70, "num_heads": 5, "v_head_dim": 21},
}


def grouped(changes: dict[str, Any]) -> GroupedQueryAttention:
    config = GroupedQueryConfig.model_validate({"num_heads": 4, "head_dim": 10, **changes})
    return filled(GroupedQueryAttention(config, HIDDEN, 1e-3, NATIVE))


def latent(changes: dict[str, Any]) -> LatentAttention:
    config = LatentConfig.model_validate({**LATENT, **changes})
    return filled(LatentAttention(config, HIDDEN, 1e-3, NATIVE, form="absorbed"))


def filled(module: Any) -> Any:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


MODULES = {
    **{f"{k}": (grouped, v) for k, v in GROUPED.items()},
    **{f"latent, {k}": (latent, v) for k, v in LATENTS.items()},
}
EVERY = pytest.mark.parametrize(("make", "changes"), MODULES.values(), ids=MODULES)


def run(module: Any, hidden: Tensor, starts: list[int], width: int, backend: Backend) -> tuple[Tensor, list[Tensor]]:
    """A cache half full of noise, then `hidden` in pieces of `width` tokens from each row's start."""
    for part in module.modules():
        if "backend" in vars(part):
            part.backend = backend
    cache = module.new_cache(len(hidden) + 1, CAPACITY).rows(1, len(hidden) + 1)
    kept = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    for value in kept:
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)))
    outputs = []
    for at in range(0, hidden.shape[1], width):
        part = hidden[:, at : at + width]
        positions = torch.tensor(starts)[:, None] + torch.arange(at, at + part.shape[1])
        outputs.append(module(part, places=Places(positions), cache=cache))
    return torch.cat(outputs, dim=1), kept


@EVERY
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 3), (3, 1), (2, 4), (8, 1), (1, 63), (2, 9)], ids=str)
def test_output_and_cache_are_torchs(make: Any, changes: dict[str, Any], batch: int, width: int) -> None:
    module, starts = make(changes), [0, 280, 40, 7, 100, 1, 2, 250][:batch]
    hidden = torch.randn(batch, 2 * width + 1, HIDDEN)
    with torch.no_grad():
        expected, stored = run(module, hidden, starts, width, TORCH)
        found, cached = run(module, hidden, starts, width, NATIVE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, stored, rtol=1e-5, atol=1e-5)


@EVERY
def test_a_position_beyond_the_capacity_is_refused(make: Any, changes: dict[str, Any]) -> None:
    module, hidden = make(changes), torch.randn(1, 1, HIDDEN)
    with torch.no_grad(), pytest.raises(IndexError, match=r"position 4 .* capacity of 4"):
        module(hidden, places=Places(torch.tensor([[4]])), cache=module.new_cache(1, 4))


def step_by_step(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds all parts for the native call fails."""
    ordinary = type(module).parts
    fail = lambda *inputs: None if ordinary(*inputs) is None else pytest.fail("took the native call")  # noqa: E731
    monkeypatch.setattr(type(module), "parts", fail)


@EVERY
def test_gradients_many_tokens_and_other_precisions_go_step_by_step(
    make: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(changes)
    step_by_step(module, monkeypatch)
    cache = module.new_cache(1, CAPACITY)
    module(torch.randn(1, 1, HIDDEN), places=Places(torch.tensor([[0]])), cache=cache)
    with torch.no_grad():
        many = MOST_TOKENS + 1
        module(torch.randn(1, many, HIDDEN), places=Places(torch.arange(many)[None]), cache=cache)
        module.double()(
            torch.randn(1, 1, HIDDEN).double(), places=Places(torch.tensor([[0]])), cache=module.new_cache(1, 2)
        )
    assert module.backend is NATIVE


@EVERY
def test_the_reference_kernel_is_used_where_it_was_asked_for(
    make: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(changes)
    step_by_step(module, monkeypatch)
    with torch.no_grad():
        run(module, torch.randn(1, 1, HIDDEN), [3], 1, backend_for(Kernels(attention="reference")))
