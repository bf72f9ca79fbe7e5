"""Moments in bfloat16 where two processes share the weights: saved either way, gone on with to the bit, by one too.

And those in float32, to the bit as torch's own optimizer moves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.core.config import merge
from finemoe.parallel.config import Layout
from finemoe.parallel.processes import Processes
from finemoe.runs import run as running
from finemoe.training.adamw import AdamWOfPieces
from finemoe.training.optimizers import optimizer_tensors
from parallel.processes import run, several
from parallel.test_run_by_many import of_steps, resume_all, tables, train_all
from parallel.test_sharded_checkpoints import at, copy_at, require_same, tensors
from parallel.tiny_layouts import OPTIMIZER, Case, trainer
from runs.tiny_runs import corpus

__all__ = ["corpus"]

ALONE = ["parallel.shard=1"]


def recipe(corpus: Path, layout: str = "shard 2", **training: Any) -> dict[str, Any]:
    return merge(tables(corpus, layout), {"optimizer": {"moments": "bf16"}, "training": training})


@pytest.fixture(scope="module")
def written(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in either format, and each from the third step on once more."""
    folder = tmp_path_factory.mktemp("moments")
    raws = {"whole": recipe(corpus), "pieces": recipe(corpus, checkpoint_format="sharded")}
    run(2, train_all, [(raw, folder / name) for name, raw in raws.items()], met=False)
    again = [copy_at(folder / name, 3, folder / f"{name} again") for name in raws]
    run(2, resume_all, [(one, []) for one in again], met=False)
    return folder


def test_both_formats_hold_the_same_moments_and_go_on_with_them(written: Path) -> None:
    for step in (3, 6):
        require_same(at(written / "pieces", step), at(written / "whole", step))
    for name in ("whole", "pieces"):
        require_same(at(written / f"{name} again", 6), at(written / name, 6))
    moments = {name: one for name, one in tensors(at(written / "pieces", 6)).items() if "exp_avg" in name}
    assert {one.dtype for one in moments.values()} == {torch.bfloat16}


def test_it_is_the_run_of_one_process_who_goes_on_with_it_too(corpus: Path, written: Path, tmp_path: Path) -> None:
    alone = running.train(recipe(corpus, "one"), out=tmp_path / "one", quiet=True).directory
    assert of_steps(written / "whole") == pytest.approx(of_steps(alone), abs=2e-5)
    for name in ("whole", "pieces"):
        running.resume(copy_at(written / name, 3, tmp_path / name), overrides=ALONE, quiet=True)
        assert of_steps(tmp_path / name) == pytest.approx(of_steps(alone), abs=2e-5)
    require_same(at(tmp_path / "whole", 6), at(tmp_path / "pieces", 6))


def stepped(layout: Layout, by_torch: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments after three steps that are clipped, by our optimizer or by torch's over whole DTensors."""
    world = Processes(layout, torch.device("cpu"))
    made = trainer(Case(steps=3, num_experts=6), world)
    [own] = made.optimizers
    assert isinstance(own, AdamWOfPieces)
    if by_torch:
        rates = {"lr": OPTIMIZER.learning_rate, "betas": OPTIMIZER.betas, "eps": OPTIMIZER.eps}
        made.optimizers = (torch.optim.AdamW(own.param_groups, fused=True, **rates),)
    for _ in range(3):
        assert made.step(made.micro_batches()).gradient_norm > OPTIMIZER.max_gradient_norm
    state = optimizer_tensors(made.optimizers, made.parameters)
    return world.gathered(made.model.state_dict()), world.gathered(state)


def test_pieces_are_stepped_to_the_bit_as_torch_steps_them() -> None:
    layouts = (Layout(shard=2), Layout(shard=2, expert=2))
    work = [(stepped, layout, by_torch) for layout in layouts for by_torch in (False, True)]
    results, _ = run(2, several, work)
    for ours, theirs in (results[:2], results[2:]):
        for found, wanted in zip(ours, theirs, strict=True):
            assert found.keys() == wanted.keys()
            assert [name for name, one in found.items() if not torch.equal(one, wanted[name])] == []
        assert sum("exp_avg" in name for name in ours[1]) > 50
