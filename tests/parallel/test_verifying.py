"""`finemoe verify-parallel`: what it calls equal, and that it runs what would be run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.config import merge
from finemoe.parallel.config import Layout, ParallelConfig
from finemoe.runs.config import resolve_run
from finemoe.runs.planning import layouts
from finemoe.runs.planning.layouts import LayoutCheck, _compared, _Done, fitting, verify_parallel
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]


def done(loss: float = 2.0, norm: float = 1.0, load: int = 3, weight: float = 0.5) -> _Done:
    return _Done([loss], [norm], [{"1": [load, 1]}], {"w": torch.tensor([weight], dtype=torch.float64)}, 0.1)


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (done(), True),
        (done(loss=2 + 5e-10, norm=1 + 5e-10, weight=0.5 + 5e-10), True),
        (done(loss=2 + 2e-9), False),
        (done(norm=1 + 2e-9), False),
        (done(weight=0.5 + 2e-9), False),
        (done(load=4), False),
        ("rank 1 gave no sign of life", False),
    ],
)
def test_what_is_more_than_rounding(found: Any, agrees: bool) -> None:
    """Complaint 8 of distribution: layouts that compute something else, and a curve that looks fine."""
    check = _compared(Layout(shard=2), found, done())
    assert check.agrees is agrees
    assert json.loads(json.dumps(check.to_dict()))["agrees"] is agrees


def test_choices_that_differ_are_counted_and_found() -> None:
    """One that went elsewhere, in the second step's deeper layer; a layer that only one of them has."""
    alone = replace(done(), loads=[{"1": [4, 4]}, {"1": [4, 4], "10": [3, 5]}], losses=[2.0, 2.0], norms=[1.0, 1.0])
    other = replace(alone, loads=[{"1": [4, 4]}, {"1": [4, 4], "10": [2, 6]}])
    assert _compared(Layout(shard=2), alone, alone).loads_apart is None
    found = _compared(Layout(shard=2), other, alone)
    assert found.loads_apart == "1 of 24 choices at least, first in step 2, layer 10"
    assert not found.agrees
    less = replace(alone, loads=[{}, {"1": [4, 4], "10": [3, 5]}])
    assert _compared(Layout(shard=2), less, alone).loads_apart == "4 of 24 choices at least, first in step 1, layer 1"


def test_layouts_that_fit(corpus: Path) -> None:
    dense = resolve_run(
        merge(recipe(corpus, "dense", training={}), {"training": {"steps": 1, "tokens_per_step": 64}}), ""
    )
    mixture = resolve_run(
        merge(recipe(corpus, "v3", training={}), {"training": {"steps": 1, "tokens_per_step": 64}}), ""
    )
    assert {layout.expert for layout in fitting(dense, 4)} == {1}
    assert {layout.expert for layout in fitting(mixture, 4)} == {1, 2, 4}
    assert all(layout.processes == 2 for layout in fitting(mixture, 2))


@pytest.mark.slow
def test_a_recipe_is_the_same_run_by_every_layout_of_two(corpus: Path) -> None:
    """Complaint 8 of distribution, where anybody can ask it of a recipe."""
    told: list[LayoutCheck] = []
    raw = merge(recipe(corpus, "v3", training={}), {"training": {"steps": 50, "tokens_per_step": 64, "threads": 1}})
    found = verify_parallel(raw, processes=2, steps=2, tell=told.append)
    assert found == told
    assert len(found) >= 3
    assert all(check.agrees for check in found), found
    assert max(check.weights or 0 for check in found) < 1e-11, "float64 from end to end: float32 anywhere shows"


@pytest.mark.slow
def test_a_layout_that_trains_something_else_is_told(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that forget to add up a few gradients: in the first step's loss and loads nothing of it shows."""
    here = Path(__file__).parents[1]
    monkeypatch.setattr(layouts, "_RUN", "parallel.wrong_double")
    monkeypatch.setattr(layouts, "fitting", lambda config, most: iter([Layout(replicate=2)]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]))
    raw = merge(recipe(corpus, "v3", training={}), {"training": {"steps": 50, "tokens_per_step": 64, "threads": 1}})
    [found] = verify_parallel(raw, processes=2, steps=2)
    assert found.failure is None
    assert found.gradient_norm is not None
    assert found.gradient_norm > 1e-6
    assert not found.agrees


@pytest.mark.parametrize(
    ("table", "processes", "said"),
    [
        ({"shard": 2}, 1, "shard 2 x context 1 are 2 processes, and 1 is running: torchrun --nproc-per-node 2"),
        (
            {"replicate": 2, "shard": 2, "expert": 2},
            1,
            "such as --set parallel.shard=1 --set parallel.replicate=1 --set",
        ),
        ({"expert": 2}, 1, "does not divide shard x context = 1: --set parallel.expert=1"),
        ({"replicate": 3}, 4, "start a multiple of 3"),
        ({"shard": 2}, 5, "shard 2 x context 1 are 2 processes, and 5 are running.*such as --set parallel.shard=5"),
        ({"replicate": 1, "shard": 2}, 4, r"torchrun --nproc-per-node 2, .*such as --set parallel.replicate=2$"),
        ({"replicate": 2, "shard": 2, "pipeline": 2}, 4, r"such as --set parallel.replicate=1$"),
        ({"shard": 4, "expert": 3}, 4, "parallel.expert 3 does not divide shard x context = 4: try one of 1, 2, 4"),
    ],
)
def test_processes_that_cannot_be_shared_out_are_refused_with_numbers_that_can(
    table: dict[str, int], processes: int, said: str
) -> None:
    with pytest.raises(Exception, match=said):
        ParallelConfig(**table).layout(processes)  # type: ignore[arg-type]


def test_what_will_not_be_built_is_refused_by_name_and_reason() -> None:
    """Complaint 9 of distribution: gradients of experts that are cut inside."""
    with pytest.raises(ValueError, match=r"parallel\.expert_tensor is not built.*use expert"):
        ParallelConfig.model_validate({"expert_tensor": 2})
    with pytest.raises(ValueError, match=r"parallel\.deepep is not built.*torch's all-to-all.*use expert"):
        ParallelConfig.model_validate({"deepep": True})


def test_what_is_left_out_is_inferred() -> None:
    assert ParallelConfig().layout(8) == Layout(shard=8)
    assert ParallelConfig(replicate=2, pipeline=2).layout(8) == Layout(pipeline=2, replicate=2, shard=2)
    assert ParallelConfig().layout(1).processes == 1
    assert ParallelConfig(shard=2).layout(4) == Layout(replicate=2, shard=2)
    split = {"shard": 2, "expert": 4, "context": 2}
    assert ParallelConfig(**split).layout(16) == Layout(replicate=4, **split)  # type: ignore[arg-type]
    assert ParallelConfig(pipeline=2, shard=1).layout(8) == Layout(pipeline=2, replicate=4)
    assert ParallelConfig(replicate=2, shard=1).layout(2) == Layout(replicate=2)
    assert ParallelConfig(shard=2, expert=2).least == 2
