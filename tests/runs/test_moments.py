"""Runs whose moments are in bfloat16: saved, gone on with to the bit, changed on the way, and counted as they are."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finemoe
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.run_state.state import MODEL, OPTIMIZER, read_part
from finemoe.core import memory
from finemoe.core.errors import ConfigError, RunError
from finemoe.runs.config import read_config, resolve_run
from finemoe.runs.footprint import footprint
from finemoe.runs.planning.distribution import plan
from finemoe.runs.run import resume, train
from finemoe.runs.start import checkpoint_bytes
from runs.tiny_runs import assert_same_run, checkpoints, newest_state, recipe, records, steps, stop_after

BF16 = {"moments": "bf16"}


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        recipe(corpus, "v3", optimizer=BF16), out=tmp_path_factory.mktemp("bf16") / "run", quiet=True
    ).directory


def moments_of(folder: Path) -> dict[str, Tensor]:
    return {name: one for name, one in read_part(folder, OPTIMIZER).items() if not name.endswith("/step")}


def test_checkpoints_hold_them_in_two_bytes_and_weights_in_four(unbroken: Path) -> None:
    newest = checkpoints(unbroken)[-1]
    weights, moments = read_part(newest, MODEL), moments_of(newest)
    assert {one.dtype for one in moments.values()} == {torch.bfloat16}
    assert {one.dtype for one in weights.values()} == {torch.float32}
    assert any(one.abs().max() > 0 for one in moments.values())
    assert examine(unbroken, deep=True).problems == ()
    assert json.loads((unbroken / "config.json").read_text())["optimizer"]["moments"] == "bf16"


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    stop_after(monkeypatch, 3)
    raw = recipe(corpus, "v3", optimizer=BF16, training={"checkpoint_format": form})
    out = train(raw, out=tmp_path / "run", quiet=True).directory
    assert len(steps(out)) == 3
    resume(out, quiet=True)
    if form == "whole":
        assert_same_run(out, unbroken)
    assert records(out) == records(unbroken)
    for part in (MODEL, OPTIMIZER):
        ours, theirs = (read_part(checkpoints(run)[-1], part) for run in (out, unbroken))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_plain_torch_and_the_native_pass_are_one_run(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.training.adamw.adamw_step", lambda *_: False)
    out = train(recipe(corpus, "v3", optimizer=BF16), out=tmp_path / "run", quiet=True).directory
    assert_same_run(out, unbroken)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_may_change_them_and_says_so(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    raw = recipe(corpus, optimizer={"moments": before})
    out = train(raw, out=tmp_path / "run", quiet=True).directory
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        resume(out, overrides=["training.steps=8", f"optimizer.moments={after}"], quiet=True)
    said = [record.getMessage() for record in caplog.records if "moments" in record.getMessage()]
    assert len(said) == 1
    assert read_config(out / "config.json").optimizer.moments == after
    tensors, _ = newest_state(out)
    found = {one.dtype for name, one in tensors.items() if "exp_avg" in name}
    assert found == {torch.bfloat16 if after == "bf16" else torch.float32}
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        resume(out, overrides=["training.steps=10"], quiet=True)
    assert not [record for record in caplog.records if "moments" in record.getMessage()]
    longer = train(recipe(corpus, optimizer={"moments": after}), out=tmp_path / "all", quiet=True).directory
    assert steps(out)[5]["loss"] == pytest.approx(steps(longer)[5]["loss"], rel=0.02)


def test_slow_betas_are_refused_in_a_recipe_and_on_the_way(corpus: Path, unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"stands still .* or moments = \"fp32\""):
        resolve_run(recipe(corpus, optimizer={**BF16, "betas": [0.9, 0.999]}), "test")
    before = (unbroken / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="stands still"):
        resume(unbroken, overrides=["training.steps=9", "optimizer.betas=[0.9, 0.999]"], quiet=True)
    assert (unbroken / "config.json").read_bytes() == before


def test_memory_disk_and_plan_count_four_bytes_a_parameter_less(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raws: list[dict[str, Any]] = [recipe(corpus, optimizer=table) for table in ({}, BF16)]
    fp32, bf16 = (resolve_run(raw, "test") for raw in raws)
    large, small = footprint(fp32), footprint(bf16)
    parameters = large.weights // 4
    assert (large.optimizer, small.optimizer) == (8 * parameters, 4 * parameters)
    assert large.needed - small.needed == large.copy - small.copy == 4 * parameters
    assert checkpoint_bytes(fp32) - checkpoint_bytes(bf16) == 4 * parameters * (fp32.training.keep_checkpoints + 1)
    (tmp_path / "one.json").write_text(json.dumps(raws[1]))
    for made in (
        plan(tmp_path / "one.json", 1, "h100"),
        plan("tiny-v3", 1, "h100", overrides=["optimizer.moments=bf16"]),
    ):
        held = made["memory"]["even"][0]
        assert held["moments"] == held["weights"] > 0
    held = plan("tiny-v3", 1, "h100")["memory"]["even"][0]
    assert held["moments"] == 2 * held["weights"]
    monkeypatch.setattr(memory, "available_bytes", lambda: small.needed)
    refused = [finemoe.check(raw, quiet=True).refused for raw in raws]
    assert "memory" in refused[0][0]
    assert refused[1] == ()


def test_where_moments_are_much_the_advice_names_them(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"hidden_size": 256, "num_layers": 4}
    training = {"tokens_per_step": 16, "micro_batch_tokens": 16}
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for table, told in ((BF16, False), ({"betas": [0.9, 0.999]}, False), ({"kind": "muon"}, False), ({}, True)):
        raw = recipe(corpus, "dense", model={**model, "feed_forward": {"ffn_hidden_size": 4096}}, training=training)
        raw["optimizer"] |= table
        with pytest.raises(RunError, match="Try a smaller model") as found:
            train(raw, out=tmp_path / "run", quiet=True)
        assert ("optimizer.moments=bf16" in str(found.value)) == told, table
