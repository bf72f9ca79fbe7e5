"""What methods and trainables keep, in checkpoints of pieces: the same bits, gone on with, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finemoe.checkpoint.adapters.files import export_adapter
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.run_state.state import METHOD, MODEL, OPTIMIZER, read_part
from finemoe.runs.run import resume, train
from methods.tiny_adaptations import begin_all, of_kinds
from runs.tiny_runs import checkpoints, corpus, stop_after

__all__ = ["corpus"]

KINDS = [
    ("sft", "lora"),
    ("dpo", "everything"),
    *(pytest.param("sft", moving, marks=pytest.mark.slow) for moving in ("experts", "child")),
]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin_all(corpus, tmp_path_factory.mktemp("methods in pieces"), training={"checkpoint_format": "sharded"})


@pytest.mark.parametrize(("method", "moving"), KINDS)
def test_a_method_is_saved_restored_and_exported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, moving: str
) -> None:
    steps = {"steps": 4, "checkpoint_every": 2}
    runs = []
    for form in ("whole", "sharded"):
        raw = of_kinds(base, method, moving, training={**steps, "checkpoint_format": form})
        if form == "sharded":
            stop_after(monkeypatch, 3)
        runs.append(train(raw, out=tmp_path / form, quiet=True).directory)
    resume(runs[1], quiet=True)
    whole, sharded = (checkpoints(run)[-1] for run in runs)
    assert not (sharded / METHOD).exists()
    for part in (MODEL, OPTIMIZER, METHOD):
        ours, theirs = read_part(sharded, part), read_part(whole, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].isnan(), one.isnan()) for name, one in theirs.items())
        assert all(torch.equal(ours[name].nan_to_num(), one.nan_to_num()) for name, one in theirs.items())
    if moving in ("lora", "experts"):
        for run in runs:
            export_adapter(run, tmp_path / f"{run.name} adapter")
        for file in (tmp_path / "whole adapter").glob("*.safetensors"):
            assert (tmp_path / "sharded adapter" / file.name).read_bytes() == file.read_bytes()
    assert load_model(runs[1]).config == load_model(runs[0]).config
