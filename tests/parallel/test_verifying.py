"""`finemoe verify-parallel`: what it calls equal, and that it runs what would be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.config import merge
from finemoe.parallel.config import Layout, ParallelConfig
from finemoe.runs.config import resolve_run
from finemoe.runs.planning.layouts import LayoutCheck, _compared, _Done, fitting, verify_parallel
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]


def done(loss: float = 2.0, norm: float = 1.0, load: int = 3, weight: float = 0.5) -> _Done:
    return _Done([loss], [norm], [{"1": [load, 1]}], {"w": torch.tensor([weight])}, 0.1)


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (done(), True),
        (done(loss=2.000004, norm=1.00004, weight=0.50009), True),
        (done(loss=2.00001), False),
        (done(norm=0.5), False),
        (done(weight=0.5002), False),
        (done(load=4), False),
        ("rank 1 gave no sign of life", False),
    ],
)
def test_what_is_more_than_rounding(found: Any, agrees: bool) -> None:
    """Complaint 8 of distribution: layouts that compute something else, and a curve that looks fine."""
    check = _compared(Layout(shard=2), found, done())
    assert check.agrees is agrees
    assert json.loads(json.dumps(check.to_dict()))["agrees"] is agrees


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


def test_what_is_left_out_is_inferred() -> None:
    assert ParallelConfig().layout(8) == Layout(shard=8)
    assert ParallelConfig(replicate=2, pipeline=2).layout(8) == Layout(pipeline=2, replicate=2, shard=2)
    assert ParallelConfig().layout(1).processes == 1
