"""The runner against whole sequences without a cache, under random schedules, and to the bit where it is steady."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.generation.runner import Ahead, Runner
from finemoe.generation.sequence import Constraint
from finemoe.generation.steady import steady
from finemoe.model.config import Kernels, expand
from finemoe.model.initialize import initialize
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer

PRESETS = ["tiny-dense", "tiny-moe", "tiny-lite", "tiny-v3"]


@dataclass
class Part:
    """A feed as the runner sees it."""

    blocks: list[int]
    start: int
    tokens: list[int]
    wants: int = 1
    copies: tuple[tuple[int, int], ...] = ()
    constraint: Constraint | None = None


@dataclass
class Texts:
    """Sequences with blocks of their own."""

    size: int
    blocks: dict[int, list[int]] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: [*range(0, 64, 2), *range(1, 64, 2)])

    def part(self, number: int, ids: list[int], start: int, count: int, **more: Any) -> Part:
        table = self.blocks.setdefault(number, [])
        while len(table) * self.size < start + count:
            table.append(self.free.pop())
        return Part(list(table), start, ids[start : start + count], wants=count, **more)


def make(preset: str, **kernels: Any) -> Transformer:
    config = expand(resolve({"preset": preset, "vocab_size": 300, "num_layers": 3}, "test"))
    model = Transformer(config, Kernels(**kernels))
    initialize(model, 0)
    return model.eval()


@pytest.fixture(scope="module", params=PRESETS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(request.param)


def text(number: int, length: int = 90) -> list[int]:
    return torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(number)).tolist()


@settings(max_examples=8)
@given(
    st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([4, 16]),
)
def test_states_are_those_of_whole_sequences(model: Transformer, schedule: list[dict[int, int]], size: int) -> None:
    runner, texts, done = Runner(model, 64, size), Texts(size), dict.fromkeys(range(4), 0)
    states: dict[int, list[torch.Tensor]] = {n: [] for n in range(4)}
    for passed in schedule:
        passed = {n: count for n, count in passed.items() if done[n] + count <= min(90, 16 * size)}
        feeds = [texts.part(n, text(n), done[n], count) for n, count in passed.items()]
        for number, found in zip(passed, runner.run(feeds) if feeds else [], strict=True):
            states[number].append(found.all)
            done[number] += passed[number]
    with torch.no_grad():
        for number in range(4):
            if done[number]:
                whole = model(torch.tensor([text(number)[: done[number]]])).hidden[0]
                torch.testing.assert_close(torch.cat(states[number]), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-v3"])
@pytest.mark.parametrize("counts", [(1, 1, 1), (9, 1, 4), (60, 30, 9)], ids=["decoding", "mixed", "prompts"])
def test_experts_alone_are_those_of_the_slower_way(preset: str, counts: tuple[int, ...]) -> None:
    """Few tokens go through whole blocks in one call, which tells no more than who was chosen."""
    model = make(preset)
    feeds = [Texts(8).part(n, text(n), 0, count) for n, count in enumerate(counts)]
    told, slow = (Runner(model, 64, 8).run(feeds, **{how: True}) for how in ("experts", "routes"))
    for ours, theirs in zip(told, slow, strict=True):
        assert torch.equal(ours.all, theirs.all)
        assert ours.experts == {layer: one.experts.tolist() for layer, one in theirs.routes.items()}
        assert set(ours.experts) == {layer for layer, block in enumerate(model.blocks) if block.routes}
        assert not ours.routes
    assert not Runner(model, 64, 8).run(feeds)[0].experts


def test_a_constraint_is_that_of_its_sequence_alone() -> None:
    model = make("tiny-moe")
    layers = list(model.moe_layers)
    without = {layer: RoutingConstraint(shared=False, num_active=3) for layer in layers}
    few = torch.zeros(63, dtype=torch.bool)
    few[:9] = True
    only = {layer: RoutingConstraint(allowed=few) for layer in layers}
    held: list[Constraint | None] = [None, without, only, None]
    together = Runner(model, 64, 8)
    texts = Texts(8)
    feeds = [texts.part(n, text(n), 0, 20 + n, constraint=held[n]) for n in range(4)]
    found = together.run(feeds, routes=True)
    for number, feed in enumerate(feeds):
        alone = Runner(model, 64, 8).run([feed], routes=True)[0]
        torch.testing.assert_close(found[number].all, alone.all, rtol=1e-4, atol=1e-5)
        for layer in layers:
            chosen = found[number].routes[layer].experts
            assert torch.equal(chosen, alone.routes[layer].experts)
            assert chosen.shape == (20 + number, 3 if held[number] is without else 7)
            assert (chosen < 9).all() or held[number] is not only


def test_a_copied_block_begins_where_its_source_was() -> None:
    model = make("tiny-lite")
    runner, ids = Runner(model, 8, 8), text(1)
    runner.run([Part([0, 1], 0, ids[:12])])
    (other,) = runner.run([Part([0, 5], 12, [7], copies=((1, 5),))])
    (own,) = runner.run([Part([0, 1], 12, [7])])
    assert torch.equal(other.all, own.all)


def test_steady_passes_give_every_sequence_the_same_bits(model: Transformer) -> None:
    if not steady(model):
        pytest.skip("no C++ kernels here")
    runs = []
    for others in ([], [1], [1, 2, 3, 4, 5, 6, 7, 8, 9]):
        runner, texts = Runner(model, 64, 16, steady=True), Texts(16)
        states = []
        for start, count in [(0, 11), *((at, 1) for at in range(11, 20))]:
            feeds = [texts.part(n, text(n), start + n * (start > 0), count + n * (start == 0)) for n in [*others, 0]]
            states.append(runner.run(feeds)[-1].all)
        runs.append(torch.cat(states))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("pieces", [(40,), (13, 1, 1, 25), (1, 39)], ids=str)
def test_prediction_modules_read_pieces_as_they_read_whole_sequences(pieces: tuple[int, ...]) -> None:
    model = make("tiny-v3")
    runner, texts, lengths = Runner(model, 64, 8), Texts(8), (41, 41)
    found: list[list[torch.Tensor]] = [[], []]
    start = 0
    for count in pieces:
        feeds = [texts.part(n, text(n), start, count) for n in (0, 1)]
        states = runner.run(feeds)
        parts = [
            Ahead(feed.blocks, start, state.all, text(n)[start + 1 : start + count + 1])
            for n, (feed, state) in enumerate(zip(feeds, states, strict=True))
        ]
        for number, (_, normed) in enumerate(runner.ahead(parts)):
            found[number].append(normed)
        start += count
    with torch.no_grad():
        for number, length in enumerate(lengths):
            whole = model(torch.tensor([text(number)[:length]]), mtp=True).mtp_hidden[0][0]
            torch.testing.assert_close(torch.cat(found[number]), whole, rtol=1e-3, atol=1e-4)
