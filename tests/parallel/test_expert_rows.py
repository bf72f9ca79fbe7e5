"""Experts that lie on other processes: what a layer computes, processes that get no token, and what is kept where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.moe import capacity
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.native import exact
from finemoe.parallel.config import Layout
from finemoe.parallel.expert import AllToAll
from finemoe.parallel.processes import Processes
from finemoe.parallel.world import SOLO
from finemoe.training.balancing import selection_biases
from finemoe.training.report import StepReport
from oracles.models import decision_of
from parallel.processes import run, several
from parallel.tiny_layouts import LAYOUTS, Case, trainer

CPU = torch.device("cpu")


def all_on_one(layout: Layout, by_group: tuple[tuple[int, int], ...]) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients when every token takes two experts of one process, in each group its own; rows by process."""
    world = Processes(layout, CPU)
    one = trainer(replace(Case(), mtp=0), world)
    for bias in selection_biases(one.model).values():
        bias.fill_(-100)
        bias[list(by_group[world.rank // layout.expert])] = 100
    report = one.step(one.micro_batches())
    anywhere = sorted({expert for chosen in by_group for expert in chosen})
    assert all(load.nonzero().flatten().tolist() == anywhere for load in report.load.values())
    found = {}
    for name, parameter in one.parameters.items():
        assert parameter.grad is not None, name
        found[name] = world.local(parameter.grad).clone()
    return found, [report.figures["expert_rows_max_over_mean"]]


@pytest.mark.parametrize("layout", [Layout(shard=2, expert=2), Layout(shard=4, expert=2)], ids=str)
def test_a_process_without_a_token_takes_part_and_learns_nothing(layout: Layout) -> None:
    """Complaints 2 and 14 of distribution: zero rows hang, or leave no gradient; nobody says how uneven rows are."""
    results: list[Any] = run(layout.processes, all_on_one, layout, ((0, 1),) * layout.expert_shard, deadline=20)
    for rank, (gradients, figures) in enumerate(results):
        stacks = {name: one for name, one in gradients.items() if ".experts." in name}
        assert stacks
        if rank % layout.expert:  # holds experts 4 to 7
            assert all(not one.any() for one in stacks.values())
        assert figures == [2.0]


def taken(layout: Layout) -> tuple[dict[int, int], int, float]:
    """Rows that the experts here are given in a step that drops some, by layer; how many are dropped; the figure."""
    world = Processes(layout, CPU)
    one = trainer(Case(mtp=0, capacity=1.0), world)
    rows: dict[int, int] = {}
    for number, layer in one.model.moe_layers.items():

        def count(module: Any, given: tuple[Tensor, Tensor], number: int = number) -> None:
            rows[number] = rows.get(number, 0) + len(given[0])

        layer.experts.register_forward_pre_hook(count)
    report = one.step(one.micro_batches())
    return rows, report.dropped, report.figures["expert_rows_max_over_mean"]


def test_the_rows_of_the_busiest_process_are_those_that_came() -> None:
    """Complaint 14 of distribution, where two groups of processes hold the same experts, and all rows of each go to
    different ones: added up, all looks even."""
    split, stages = Layout(shard=4, expert=2), Layout(pipeline=2, shard=2, expert=2)
    work = [(all_on_one, split, ((0, 1), (6, 7))), (taken, split), (taken, stages)]
    for (_, figures), *counted in (results := run(4, several, work, deadline=30)):
        assert figures == [2.0]
        assert all(drops > 0 for _, drops, _ in counted)
    for place in (1, 2):
        everybody = [found[place] for found in results]
        layers: dict[int, list[int]] = {}
        for number, rows in ((number, rows) for own, _, _ in everybody for number, rows in own.items()):
            layers.setdefault(number, []).append(rows)
        assert {number: len(rows) for number, rows in layers.items()} == dict.fromkeys((1, 2), 4 // place)
        worst = max(max(rows) / (sum(rows) / len(rows)) for rows in layers.values())
        assert worst > 1
        assert all(figure == pytest.approx(worst, rel=1e-12) for _, _, figure in everybody)


class Waits(TorchFunctionMode):
    """Counts what a GPU would be waited for: numbers that the host reads, and lengths that only values tell."""

    _READ = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.__bool__, Tensor.__int__)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_host: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, given: Any = (), settings: Any = None) -> Any:
        settings = settings or {}
        reads = function in self._READ and not any(given[0] is one for one in self._on_host)
        masks = function in (Tensor.__getitem__, Tensor.__setitem__) and getattr(given[1], "dtype", None) == torch.bool
        repeats = "repeat_interleave" in function.__name__ and settings.get("output_size") is None
        if reads or masks or repeats:
            self.found.append(function.__name__)
        result = function(*given, **settings)
        if function is torch.tensor:
            self._on_host.append(result)
        return result


def waits(kernel: str) -> list[str]:
    """Of one layer, there and back, as it is on a GPU: without the C++ that sorts on a CPU."""
    group = AllToAll(distributed.group.WORLD, 2)
    hidden = torch.randn(6, 4, requires_grad=True)
    experts = [torch.randn(2, 8, 4, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)]
    decision: RoutingDecision = decision_of(torch.tensor([[0, 3], [1, 2]]).repeat(3, 1), 4)
    with patch.object(exact, "available", lambda: False), Waits() as counted:
        rows, counts, ticket = group.dispatch(hidden, decision, None)
        output = group.combine(EXPERT_KERNELS[kernel](rows, counts, *experts), ticket, torch.ones(6, 2))
        output.sum().backward()
    assert hidden.grad is not None
    return counted.found


def dropped() -> list[Tensor]:
    """Nothing is kept: neither process sends a row, and both meet in the backward pass."""
    group = AllToAll(distributed.group.WORLD, 2)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    decision: RoutingDecision = decision_of(torch.tensor([[0, 3]]).expand(6, 2), 4)
    rows, counts, ticket = group.dispatch(hidden, decision, torch.zeros(6, 2, dtype=torch.bool))
    assert rows.shape == (0, 4)
    assert counts.tolist() == [0, 0]
    output = group.combine(rows @ weight, ticket, torch.zeros(6, 2, dtype=torch.float64))
    output.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [output.detach(), hidden.grad, weight.grad]


@dataclass(frozen=True)
class Learnt:
    """What one step came to."""

    report: StepReport
    gradients: dict[str, Tensor]
    """Whole, on rank 0."""


def learnt(layout: Layout | None, limit: float | None, least: bool = False, counting: bool = True) -> Learnt:
    """One step; a whole model's two passes of four sequences each, or one of each process.

    Args:
        layout: of processes.
        limit: capacity of experts.
        least: a capacity is 0 and not 1, which is what it is at least.
        counting: False where the first half of the sequences holds nothing to learn from.
    """
    world = SOLO if layout is None else Processes(layout, CPU)
    one = trainer(Case(steps=1, micro=4, mtp=0, capacity=limit), world)
    batches = one.micro_batches()
    if not counting and world.rank == 0:
        batches[0] = replace(batches[0], weights=torch.zeros_like(batches[0].weights))
    original = capacity._capacity
    if least:
        capacity._capacity = lambda assignments, groups, factor: 0
    try:
        report = one.step(batches)
    finally:
        capacity._capacity = original
    assert all(parameter.grad is not None for parameter in one.parameters.values())
    return Learnt(report, world.gathered({name: parameter.grad for name, parameter in one.parameters.items()}))


EVEN = Layout(shard=2, expert=2)
STEPS: dict[str, tuple[Any, ...]] = {
    "limited": (learnt, EVEN, 0.5),
    "nothing kept": (learnt, EVEN, 0.5, True),
    "nothing to count": (learnt, EVEN, None, False, False),
}

KERNELS = ("loop", "sorted_slices", "grouped_mm")


@cache
def by_two() -> dict[str, tuple[Any, ...]]:
    """By rank, in processes that are started once."""
    work = {"exchange": (dropped,), **{kernel: (waits, kernel) for kernel in KERNELS}, **STEPS}
    return dict(zip(work, zip(*run(2, several, list(work.values()), deadline=20), strict=True), strict=True))


def test_when_capacity_drops_everything_nobody_waits() -> None:
    """Complaint 2 of distribution, where no process sends a row, in an exchange and in layers of a whole step."""
    for found in by_two()["exchange"]:
        assert not any(one.any() for one in found)
    for kernel in KERNELS:  # and where nothing is dropped, a layer waits for its device once, for the splits
        assert by_two()[kernel] == (["tolist"], ["tolist"])
    first, second = by_two()["nothing kept"]
    routed = sum(int(load.sum()) for load in first.report.load.values())
    assert first.report.dropped == second.report.dropped == routed
    for name, gradient in first.gradients.items():
        assert bool(gradient.any()) != (".experts." in name), name


@pytest.mark.parametrize("name", ["limited", "nothing to count"])
def test_what_a_process_drops_or_does_not_count_is_what_one_process_would(name: str) -> None:
    """Complaint 2 of distribution: a layer's capacity, by a pass; a process of whose own tokens none counts."""
    expected = STEPS[name][0](None, *STEPS[name][2:])
    assert (expected.report.dropped > 0) == (name == "limited")
    first, second = by_two()[name]
    for one in (first, second):
        assert one.report.dropped == expected.report.dropped
        assert one.report.loss == pytest.approx(expected.report.loss, rel=1e-6)
        assert all(torch.equal(load, expected.report.load[layer]) for layer, load in one.report.load.items())
    for key, gradient in expected.gradients.items():
        assert (first.gradients[key] - gradient).norm() <= 1e-12 * gradient.norm(), key


def held(layout: Layout | None) -> tuple[int, int]:
    """Bytes of parameters and moments that lie here; those of routed experts alone."""
    world = SOLO if layout is None else Processes(layout, CPU)
    one = trainer(Case(torch.float32, steps=1), world)
    one.step(one.micro_batches())
    sizes: dict[str, int] = {}
    for name, parameter in one.parameters.items():
        states = [state.get(parameter, {}) for state in (optimizer.state for optimizer in one.optimizers)]
        moments = [value for state in states for key, value in state.items() if key != "step"]
        assert len(moments) == 2
        sizes[name] = sum(world.local(tensor).nbytes for tensor in (parameter, *moments))
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)


def test_two_processes_hold_half_each() -> None:
    whole, experts = held(None)
    for found in run(2, several, [(held, LAYOUTS[name]) for name in ("shard 2", "shard 2, experts 2")]):
        for here, routed in found:
            assert here <= 0.52 * whole
            assert routed == experts / 2


def resident() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])


def grown() -> float:
    """Of memory, between steps 20 and 60 with experts elsewhere and activations computed again."""
    world = Processes(LAYOUTS["shard 2, experts 2"], CPU)
    one = trainer(Case(torch.float32, steps=60, recompute=True), world)
    before = 0
    for step in range(60):
        one.step(one.micro_batches())
        if step == 20:
            before = resident()
    return resident() / before - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account")
def test_memory_does_not_grow_while_rows_travel() -> None:
    """Complaint 13 of distribution: what an all-to-all and recomputation kept for ever."""
    assert all(share < 0.02 for share in run(2, grown, deadline=120))
