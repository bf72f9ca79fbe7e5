"""How a run of several processes ends early: what is not finite is said once, and two signals are one request."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from finemoe.core.config import merge
from finemoe.core.errors import TrainingError
from finemoe.parallel.config import Layout
from finemoe.parallel.processes import Processes
from finemoe.parallel.seat import resuming
from finemoe.training.stopping import StopOnSignal, repeated
from parallel.processes import run
from parallel.test_restarts import steps_done, torchrun, wait_for, workers
from parallel.test_run_by_many import tables
from parallel.tiny_layouts import Case, trainer
from runs.tiny_runs import corpus

__all__ = ["corpus"]


def poisoned(layout: Layout, name: str, rank: int) -> tuple[str, bool, int]:
    """What is raised where the piece that one rank has of a weight holds one number that is none; the step after it."""
    world = Processes(layout, torch.device("cpu"))
    made = trainer(Case(steps=2, micro=1 if layout.pipeline > 1 else 4), world)
    with torch.no_grad():
        if world.rank == rank:
            world.local(made.parameters[name]).view(-1)[0] = torch.nan
    with pytest.raises(TrainingError) as caught:
        made.step(made.micro_batches())
    return str(caught.value), caught.value.everywhere, made.state.step


CASES = {
    "stages": (Layout(pipeline=2), "blocks.2.attention.o_proj.weight", 1),
    "shards": (Layout(shard=2), "norm.weight", 1),
    "experts": (Layout(shard=2, expert=2), "blocks.1.feed_forward.experts.down_proj", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_raise_one_error_that_names_the_tensors_of_each(case: str) -> None:
    layout, name, rank = CASES[case]
    (first, quiet, step), (second, also, _) = run(2, poisoned, layout, name, rank)
    assert first == second
    assert quiet
    assert also
    assert step == 0
    assert f"first bad tensors: weight of {name} on rank {rank}" in first
    assert "on another rank" not in first


@pytest.mark.slow
def test_it_is_printed_once_and_all_end_alike(corpus: Path, tmp_path: Path) -> None:
    raw = merge(tables(corpus, "experts 2"), {"model": {"init_std": 1e30}})
    with torchrun(raw, tmp_path / "run", restarts=0) as started:
        assert started.wait(120) != 0
    said = (tmp_path / "run.log").read_text()
    assert said.count("is not finite") == 1, said
    assert "error on rank" not in said
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", said)
    assert codes, said
    assert set(codes) <= {"2", "-15"}, said  # torchrun may end one that has not come to its own end


def test_a_second_sigterm_is_python_s_own_only_where_a_run_is_alone() -> None:
    asked: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal(lambda: asked.append(1), repeated=repeated(2)):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) != before
    assert len(asked) == 2
    with StopOnSignal(lambda: asked.append(1), repeated=repeated(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
    assert len(asked) == 3


@pytest.mark.slow
def test_a_signal_that_comes_twice_saves_all_the_same(corpus: Path, tmp_path: Path) -> None:
    """As a batch system tells every process of a job, and torchrun those that it started."""
    raw = merge(tables(corpus, "experts 2"), {"training": {"steps": 100_000, "checkpoint_every": 100_000}})
    out = tmp_path / "run"
    with torchrun(raw, out, restarts=0) as started:
        wait_for(lambda: len(steps_done(out)) >= 5)
        told = [*workers(started.pid), started.pid]
        for pid in told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        started.wait(120)
    said = (tmp_path / "run.log").read_text()
    [saved] = (out / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == steps_done(out)[-1], said
    assert f"Go on with: torchrun --nproc-per-node 2 -m finemoe resume {out}" in said, "one process alone is refused"


@pytest.mark.parametrize(
    ("processes", "here", "said"),
    [
        (None, None, "finemoe resume 'a run'"),
        (1, 1, "finemoe resume 'a run'"),
        (2, 2, "torchrun --nproc-per-node 2 -m finemoe resume 'a run'"),
        (
            32,
            8,
            "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n1:29500 -m finemoe resume "
            "'a run'",
        ),
    ],
)
def test_the_way_to_go_on_starts_as_many_processes(
    processes: int | None, here: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if processes is not None:
        told = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": 1}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "n1")
    assert resuming("a run") == said
