"""Attention over a cache in blocks against attention over whole sequences, for every variant, backend and type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finemoe.model import native
from finemoe.model.attention import ATTENTIONS
from finemoe.model.attention.blocks import Group
from finemoe.model.attention.places import Places
from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH, backend_for
from finemoe.model.config import Kernels

HIDDEN, LONGEST = 24, 61
LATENT = {"num_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi head": ("grouped_query", {"num_heads": 4, "num_kv_heads": 4, "head_dim": 10}),
    "grouped": ("grouped_query", {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "qk_norm": "head"}),
    "one key head, biases, partly turning": (
        "grouped_query",
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 12, "qkv_bias": True, "rotary_dim": 4},
    ),
    "latent": ("latent", {**LATENT, "q_lora_rank": 8}),
    "latent, plain query": ("latent", LATENT),
}
BACKENDS = {"torch": TORCH, "native": NATIVE, "reference": backend_for(Kernels(attention="reference"))}


def build(name: str, backend: Backend) -> Any:
    kind, changes = MODULES[name]
    config, module = ATTENTIONS[kind]
    made: Any = module(config.model_validate(changes), HIDDEN, 1e-5, backend)  # type: ignore[call-arg, arg-type]
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


class Shared:
    """Sequences of hidden states that share the blocks of one cache, handed out in no order at all."""

    def __init__(self, module: Any, size: int, dtype: torch.dtype | None, seed: int) -> None:
        self.module, self.size = module, size
        self.free = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        self.cache = module.new_cache(41, size, dtype)
        for value in vars(self.cache).values():
            if isinstance(value, Tensor):
                value.copy_(torch.full(value.shape, 100.0))  # what nobody wrote must not be seen
        self.tables: list[list[int]] = []
        self.done: list[int] = []

    def feed(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """`[tokens, hidden]` of each sequence, all in one pass: what attention makes of them."""
        for number, part in parts.items():
            while number >= len(self.tables):
                self.tables.append([])
                self.done.append(0)
            while len(self.tables[number]) * self.size < self.done[number] + len(part):
                self.tables[number].append(self.free.pop())
        widths: dict[int, list[int]] = {}
        for number, part in parts.items():
            widths.setdefault(len(part), []).append(number)
        groups, order, first = [], [], 0
        for width, numbers in widths.items():
            longest = max(len(self.tables[number]) for number in numbers)
            tables = torch.tensor([self.tables[n] + [40] * (longest - len(self.tables[n])) for n in numbers])
            starts = torch.tensor([[self.done[number]] for number in numbers])
            groups.append(Group(first, starts + torch.arange(width), tables, self.size))
            order += numbers
            first += width * len(numbers)
        positions = torch.cat([group.positions.flatten() for group in groups])[None]
        places = Places(positions, groups=groups)
        flat = self.module(torch.cat([parts[number] for number in order])[None], places=places, cache=self.cache)[0]
        found = {}
        for number in order:
            found[number], flat = flat[: len(parts[number])], flat[len(parts[number]) :]
            self.done[number] += len(parts[number])
        return found


def whole(module: Any, hidden: Tensor) -> Tensor:
    return module(hidden[None], places=Places(torch.arange(len(hidden))[None]), cache=None)[0]


SCHEDULE = st.lists(
    st.dictionaries(st.integers(0, 4), st.integers(1, 23), min_size=1, max_size=5), min_size=1, max_size=6
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=12)
@given(schedule=SCHEDULE, size=st.sampled_from([1, 3, 8, 16]), seed=st.integers(0, 5))
def test_a_flat_pass_over_blocks_is_attention_over_whole_sequences(
    name: str, backend: str, schedule: list[dict[int, int]], size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = build(name, BACKENDS[backend])
    shared = Shared(module, size, None, seed)
    hidden, found = torch.randn(5, 140, HIDDEN), [torch.empty(0, HIDDEN) for _ in range(5)]
    room = 40 * size
    with torch.no_grad():
        for parts in schedule:
            fed = {n: hidden[n, len(found[n]) : len(found[n]) + width] for n, width in parts.items()}
            needed = sum(-(-(len(found[n]) + len(fed.get(n, ()))) // size) for n in range(5))
            if needed * size > room or any(len(found[n]) + width > 140 for n, width in parts.items()):
                continue
            for number, states in shared.feed(fed).items():
                found[number] = torch.cat((found[number], states))
        for number in range(5):
            if len(found[number]):
                expected = whole(module, hidden[number, : len(found[number])])
                torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.2)], ids=str)
def test_narrow_types_are_near_and_never_equal(name: str, backend: str, dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(3)
    module = build(name, BACKENDS[backend])
    hidden, shared = torch.randn(2, 40, HIDDEN), Shared(module, 8, dtype, 1)
    with torch.no_grad():
        first = shared.feed({0: hidden[0, :30], 1: hidden[1, :12]})
        later = shared.feed({0: hidden[0, 30:31], 1: hidden[1, 12:13]})
        for number, done in ((0, 31), (1, 13)):
            expected = whole(module, hidden[number, :done])
            got = torch.cat((first[number], later[number]))
            error = (got - expected).norm() / expected.norm()
            assert 1e-6 < error < within


@pytest.mark.skipif(not native.available(), reason="no C++ kernels here")
@pytest.mark.parametrize("name", MODULES)
def test_blocks_change_no_bit_of_what_a_rectangular_cache_gives(name: str) -> None:
    module = build(name, NATIVE)
    hidden, shared = torch.randn(3, LONGEST, HIDDEN), Shared(module, 16, None, 2)
    cache = module.new_cache(3, LONGEST)
    with torch.no_grad():
        for first, last in ((0, 40), (40, 41), (41, 43), (43, LONGEST)):
            positions = torch.arange(first, last).expand(3, -1)
            expected = module(hidden[:, first:last], places=Places(positions), cache=cache)
            found = shared.feed({n: hidden[n, first:last] for n in range(3)})
            assert all(torch.equal(found[n], expected[n]) for n in range(3))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", MODULES)
def test_a_position_beyond_the_blocks_is_refused(name: str, backend: str) -> None:
    module = build(name, BACKENDS[backend])
    group = Group(0, torch.tensor([[16]]), torch.tensor([[0, 1]]), 8)
    with torch.no_grad(), pytest.raises(IndexError, match=r"position 16 is beyond its sequence's blocks.* 16 tokens"):
        module(torch.randn(1, 1, HIDDEN), places=Places(group.positions, groups=[group]), cache=module.new_cache(2, 8))


@pytest.mark.skipif(not native.available(), reason="no C++ kernels here")
@pytest.mark.parametrize("block", [-1, 2, 1 << 40])
def test_a_block_that_does_not_exist_is_refused(block: int) -> None:
    module = build("grouped", NATIVE)
    group = Group(0, torch.tensor([[0]]), torch.tensor([[block]]), 8)
    with torch.no_grad(), pytest.raises(IndexError, match="outside the blocks"):
        module(torch.randn(1, 1, HIDDEN), places=Places(group.positions, groups=[group]), cache=module.new_cache(2, 8))


def test_a_copied_block_holds_the_same() -> None:
    for name in ("grouped", "latent"):
        cache = build(name, TORCH).new_cache(3, 4)
        kept = [value for value in vars(cache).values() if isinstance(value, Tensor)]
        for value in kept:
            value.normal_()
        cache.copy(0, 2)
        assert all(torch.equal(value[0], value[2]) and not torch.equal(value[0], value[1]) for value in kept)
