"""Processes that meet over NCCL: `pytest -m gpu tests/parallel`. Slow tests run the same lines over gloo on the CPU.

With one GPU a world of one process goes the ways of several: process groups, weights cut by FSDP2, experts that rows
travel to, checkpoints in pieces. With two and more, layouts of two processes against one.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from finemoe.core.config import merge
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.parallel import meeting
from finemoe.parallel.config import Layout
from finemoe.parallel.expert import AllToAll
from finemoe.parallel.processes import Processes
from finemoe.parallel.seat import seat
from finemoe.parallel.shard import cut, place_experts
from finemoe.parallel.world import SOLO
from finemoe.runs import run as running
from finemoe.training.balancing import selection_biases
from finemoe.training.report import StepReport
from oracles.models import decision_of
from parallel.processes import run, several
from parallel.test_run_by_many import of_steps
from parallel.tiny_layouts import Case, trained_in, trainer
from runs.forking import CONTEXT
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
)
LAYOUTS = (Layout(replicate=2), Layout(shard=2), Layout(shard=2, expert=2), Layout(context=2))
Found = tuple[list[StepReport], dict[str, Tensor]]


def by(processes: int, device: str, function: Callable[..., Any], *args: Any, met: bool = True) -> list[Any]:
    """What `function(*args)` returns on each rank, where the processes have met over the device's own library.

    For GPUs they are started anew and not forked: what has asked for one can give none to those that it forks.
    """
    if device == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} CUDA devices, and there are {torch.cuda.device_count()}")
    context = multiprocessing.get_context("spawn") if device == "cuda" else CONTEXT
    work = (met_on, device, function, *args) if met else (function, *args)
    return run(processes, *work, deadline=240, met=False, context=context)


def met_on(device: str, function: Callable[..., Any], *args: Any) -> Any:
    here = seat()
    assert here is not None
    with meeting.together(here, Layout(replicate=here.processes), torch.device(device), 1, 120.0):
        return function(*args)


def one_as_many(device: str) -> Processes:
    """A world of one process, whose weights are cut into one piece and whose experts lie on one process.

    Of a run that is alone nothing would be spread.
    """
    world = Processes(Layout(), torch.device(device))

    def spread(model: Any, products: torch.dtype | None = None) -> None:
        mesh = init_device_mesh(device, (1, 1), mesh_dim_names=("expert_shard", "expert"))
        place_experts(model, mesh["expert"])
        cut(model, world.dense["fsdp"], mesh["expert_shard"], products)

    world.spread = spread  # type: ignore[method-assign]
    Processes.sharded = property(lambda world: True)  # type: ignore[assignment]  # of a process that ends with the test
    return world


def require_six_steps(found: Found, expected: Found) -> None:
    """In float32, as over gloo."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=5e-5)
        assert {layer: int(load.sum()) for layer, load in ours.load.items()} == {
            layer: int(load.sum()) for layer, load in theirs.load.items()
        }
    assert found[1].keys() == expected[1].keys()
    assert max((found[1][name] - one).abs().max().item() for name, one in expected[1].items()) < 1e-4


def alone_and_as_many(case: Case) -> tuple[Found, Found, set[Any]]:
    """Without a process group and with one; where and as what weights and gradients lay in the second."""
    alone = trained_in(SOLO, case)
    world = one_as_many(case.device)
    made = trainer(case, world)
    made.step(made.micro_batches())
    assert all(isinstance(one, DTensor) for one in made.parameters.values())
    lay = {
        (one.device.type, one.dtype) for parameter in made.parameters.values() for one in (parameter, parameter.grad)
    }
    return alone, trained_in(world, case), lay


@DEVICES
def test_one_process_that_goes_the_ways_of_many_takes_the_same_steps(device: str) -> None:
    case = Case(torch.float32, steps=6, device=device)
    [(alone, many, lay)] = by(1, device, alone_and_as_many, case)
    require_six_steps(many, (alone[0], {name: one.cpu() for name, one in alone[1].items()}))
    assert lay == {(device, torch.float32)}


@DEVICES
def test_products_in_bf16_leave_weights_and_gradients_in_float32(device: str) -> None:
    """What is summed over processes too. Two steps: later ones may choose other experts."""
    case = Case(torch.float32, steps=2, device=device, bf16=True)
    [(alone, many, lay)] = by(1, device, alone_and_as_many, case)
    for ours, theirs in zip(many[0], alone[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-3)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=2e-2)
    assert lay == {(device, torch.float32)}


def exchanged(device: str, tokens: list[int], experts: list[int]) -> float:
    """How far rows that travelled are from rows that stayed, and their gradients; every rank has as many as it says.

    Each expert multiplies by a number of its own. `experts`: that are chosen among four.
    """
    from torch import distributed

    rank, size = distributed.get_rank(), distributed.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    chosen = torch.rand(tokens[rank], len(experts), generator=generator).argsort(1)[:, :2]
    decision = decision_of(torch.tensor(experts)[chosen].to(device), 4)
    given = torch.randn(tokens[rank], 8, dtype=torch.float64, generator=generator).to(device)
    gates = torch.rand(tokens[rank], 2, dtype=torch.float64, generator=generator).to(device)
    found = []
    mesh = init_device_mesh(device, (size,))
    for dispatch, first, own in (
        (LocalDispatch(), 0, 4),
        (AllToAll(mesh.get_group(), size), 4 // size * rank, 4 // size),
    ):
        hidden, weights = given.clone().requires_grad_(), gates.clone().requires_grad_()
        rows, counts, ticket = dispatch.dispatch(hidden, decision, None)
        factors = torch.arange(first + 1, first + own + 1, dtype=torch.float64, device=device)
        output = dispatch.combine(rows * factors.repeat_interleave(counts.to(rows.device))[:, None], ticket, weights)
        output.square().sum().backward()
        assert hidden.grad is not None
        assert weights.grad is not None
        found.append((output.detach(), hidden.grad, weights.grad))
    return max((float((a - b).abs().max()) if a.numel() else 0.0) for a, b in zip(*found, strict=True))


ROWS: dict[str, tuple[list[int], list[int]]] = {
    "one": ([33], [0, 1, 2, 3]),
    "one without a token": ([0], [0, 1]),
    "uneven": ([7, 33], [0, 1, 2, 3]),
    "all to the second": ([7, 33], [2, 3]),
    "the first without a token": ([0, 5], [0, 3]),
}
"""Tokens of each process, and the experts among which they choose."""


@DEVICES
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_travel_in_uneven_pieces(device: str, processes: int) -> None:
    """Complaint 2 of distribution on GPUs: processes that send or receive nothing."""
    cases = {name: one for name, one in ROWS.items() if len(one[0]) == processes}
    for found in by(processes, device, several, [(exchanged, device, *one) for one in cases.values()]):
        assert {name: apart for name, apart in zip(cases, found, strict=True) if apart > 1e-12} == {}


def two(device: str) -> list[Found]:
    """Six steps by every layout of two processes."""
    return [trained_in(Processes(layout, torch.device(device)), case_of(layout, device)) for layout in LAYOUTS]


def case_of(layout: Layout, device: str) -> Case:
    return Case(torch.float32, steps=6, micro=4, mtp=int(layout.context == 1), device=device)


@DEVICES
def test_two_processes_take_the_steps_of_one(device: str) -> None:
    ranks = by(2, device, two, device)
    for number, layout in enumerate(LAYOUTS):
        expected = trained_in(SOLO, case_of(layout, device))
        weights = {name: one.cpu() for name, one in expected[1].items()}
        require_six_steps(ranks[0][number], (expected[0], weights))
        assert [one.loss for one in ranks[1][number][0]] == [one.loss for one in ranks[0][number][0]], str(layout)


def all_on_first(device: str) -> tuple[int, dict[str, bool]]:
    """Experts 0 and 1 get every token: which stacks of this process have a gradient that is not 0."""
    world = Processes(Layout(shard=2, expert=2), torch.device(device))
    made = trainer(Case(steps=1, mtp=0, device=device), world)
    for bias in selection_biases(made.model).values():
        bias.fill_(-100)
        bias[:2] = 100
    made.step(made.micro_batches())
    stacks = {name: one.grad for name, one in made.parameters.items() if ".experts." in name}
    assert all(one is not None for one in stacks.values())
    return world.rank, {name: bool(world.local(one).any()) for name, one in stacks.items()}


@DEVICES
def test_a_process_without_rows_takes_part(device: str) -> None:
    for rank, learnt in by(2, device, all_on_first, device):
        assert learnt
        assert set(learnt.values()) == {rank == 0}


def table(corpus: Path, device: str, **parallel: int) -> dict[str, Any]:
    """Six steps, saved in pieces at the third and the last."""
    training = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 5, "tokens_per_step": 128, "evaluate_every": 3}
    training |= {"checkpoint_format": "sharded", "device": device, "precision": "fp32", "threads": 1}
    changes = {"training": training, "parallel": parallel, "kernels": {"experts": "sorted_slices"}}
    return merge(recipe(corpus, "v3", training={}), changes)


@contextmanager
def met_alone(layout: Layout, device: torch.device, threads: int, timeout: float) -> Iterator[Processes]:
    """In place of `meet`, which gives one process a world without any group."""
    here = seat()
    assert here is not None
    with meeting.together(here, layout, device, threads, timeout):
        yield one_as_many(device.type)


def runs(work: Callable[[], Any]) -> None:
    here = seat()
    if here is not None and here.processes == 1:
        running.meet = met_alone  # type: ignore[assignment]  # of a process that ends with the test
    work()


def by_runs(processes: int, device: str, work: Callable[[], Any]) -> None:
    """Whole runs meet by themselves."""
    by(processes, device, runs, work, met=False)


@DEVICES
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_all_save_goes_on(corpus: Path, tmp_path: Path, device: str, processes: int) -> None:
    """To the bit on a CPU; a GPU adds up in another order each time, by as much as another layout does."""
    out, again = tmp_path / "run", tmp_path / "again"
    raw = table(corpus, device, shard=processes, expert=processes)
    by_runs(processes, device, partial(running.train, raw, out=out, quiet=True))
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    (again / "summary.json").unlink()
    by_runs(processes, device, partial(running.resume, again, quiet=True))
    files = sorted(path.name for path in (again / "checkpoints" / "step-00000006").glob("*-rank*.safetensors"))
    assert len(files) == 2 * processes
    assert of_steps(again) == pytest.approx(of_steps(out), abs=2e-6)
    if device == "cpu":
        for name in files:
            ours, theirs = (one / "checkpoints" / "step-00000006" / name for one in (again, out))
            assert ours.read_bytes() == theirs.read_bytes()
    alone = running.train(table(corpus, device, shard=1), out=tmp_path / "alone", quiet=True).directory
    assert of_steps(out) == pytest.approx(of_steps(alone), abs=5e-6)
