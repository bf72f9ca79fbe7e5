"""Every choice of what may move, with moments in bfloat16: broken off, gone on with, the unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finemoe.runs.run import resume, train
from methods.tiny_adaptations import MOVE, begin_all, of_kinds
from runs.tiny_runs import assert_same_run, checkpoints, corpus, stop_after

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin_all(corpus, tmp_path_factory.mktemp("what moves"))


@pytest.mark.parametrize("moving", MOVE)
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moving: str
) -> None:
    tables = {"training": {"steps": 4, "checkpoint_every": 2}, "optimizer": {"moments": "bf16"}}
    raw = of_kinds(base, "sft", moving, **tables)
    unbroken = train(raw, out=tmp_path / "unbroken", quiet=True).directory
    stop_after(monkeypatch, 3)
    broken = train(raw, out=tmp_path / "broken", quiet=True).directory
    resume(broken, quiet=True)
    assert_same_run(broken, unbroken)
    kept = load_file(checkpoints(broken)[-1] / "optimizer.safetensors")
    assert {one.dtype for name, one in kept.items() if "exp_avg" in name} == {torch.bfloat16}
