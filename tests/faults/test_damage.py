"""Damaged files, full disks, non-finite losses and changed corpora in a run directory."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.processes import finish, write_config
from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.run_state.state import load_latest, load_model
from finemoe.core.errors import CheckpointError, ConfigError, RunError, TrainingError
from finemoe.core.logs import JsonLines
from finemoe.runs import run as run_module
from finemoe.runs.run import resume, train
from finemoe.studies.worker import FAILED, FINISHED
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, newest_state, recipe, records, steps, write_corpus


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps with checkpoints after 2, 4 and 6, of which the last two are kept."""
    return train(recipe(corpus), out=tmp_path_factory.mktemp("unbroken") / "run", quiet=True).directory


@pytest.fixture
def unfinished(unbroken: Path, tmp_path: Path) -> Path:
    """The same, killed just before the summary."""
    copy = tmp_path / "run"
    shutil.copytree(unbroken, copy)
    (copy / "summary.json").unlink()
    return copy


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    unbroken: Path, unfinished: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], file: str
) -> None:
    newest = checkpoints(unfinished)[-1]
    damage(newest / file)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        resume(unfinished, quiet=True)
    assert f"{newest.name} is damaged" in caplog.text
    assert_same_run(unbroken, unfinished)


def test_with_every_checkpoint_damaged_the_run_says_so_and_touches_nothing(unfinished: Path) -> None:
    for folder in checkpoints(unfinished):
        truncate(folder / "model.safetensors")
    before = (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="all 3 are damaged; start the run again"):
        resume(unfinished, quiet=True)
    assert (unfinished / "metrics.jsonl").read_bytes() == before


def test_leftovers_of_a_kill_are_ignored_and_cleaned(unbroken: Path, unfinished: Path) -> None:
    shutil.rmtree(checkpoints(unfinished)[-1])
    stale = unfinished / "checkpoints" / ".writing-99999"
    shutil.copytree(checkpoints(unfinished)[-1], stale)
    resume(unfinished, quiet=True)
    assert not stale.exists()
    assert_same_run(unbroken, unfinished)


@pytest.mark.parametrize("tail", ['{"kind": "st', '{"kind": "step", "step": 6}', "\x00\x00", "{"])
def test_a_torn_last_line_of_the_metrics_is_written_again(unbroken: Path, unfinished: Path, tail: str) -> None:
    shutil.rmtree(checkpoints(unfinished)[-1])  # so that step 5 and 6 run again
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write(tail)
    resume(unfinished, quiet=True)
    assert_same_run(unbroken, unfinished)


@pytest.mark.parametrize("missing", ["tokenizer.json", "data.json", "environment.json"])
def test_what_a_kill_left_out_at_the_start_is_made_up_for(unbroken: Path, unfinished: Path, missing: str) -> None:
    (unfinished / missing).unlink()
    resume(unfinished, quiet=True)
    if missing != "environment.json":
        assert (unfinished / missing).read_bytes() == (unbroken / missing).read_bytes()
    assert (unfinished / missing).exists()


def test_a_run_without_its_configuration_is_refused(unfinished: Path) -> None:
    truncate(unfinished / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: not the configuration of a run"):
        resume(unfinished, quiet=True)


def test_a_changed_corpus_is_refused_on_resume(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    out = train(recipe(corpus), out=tmp_path / "run", quiet=True).directory
    (out / "summary.json").unlink()
    text = (corpus / "train" / "0.txt").read_text()
    (corpus / "train" / "0.txt").write_text(text[:-2] + "!\n")  # of the same length
    before = newest_state(out)[1]
    with pytest.raises(RunError, match=r"the corpus is not what this run .*\(corpus_sha256 .*another finemoe made"):
        resume(out, quiet=True)
    assert newest_state(out)[1] == before
    (corpus / "train" / "0.txt").write_text(text)
    assert not resume(out, quiet=True).interrupted


def full_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """`owner.name` finds the disk full from its `call`-th use on."""
    original, uses = getattr(owner, name), 0

    def limited(*arguments: Any, **named: Any) -> Any:
        nonlocal uses
        uses += 1
        if uses >= call:
            if name == "close":  # a close that fails has closed all the same
                original(*arguments, **named)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize(
    ("owner", "name", "call", "path"),
    [
        (JsonLines, "write", 5, "metrics.jsonl"),
        (JsonLines, "close", 1, "metrics.jsonl"),
        (run_state, "sync", 3, "step-00000004"),  # two for each checkpoint
    ],
)
def test_a_full_disk_names_the_path_and_the_run_goes_on_later(
    corpus: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    path: str,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        full_disk(patched, owner, name, call)
        with pytest.raises(RunError) as caught:
            train(recipe(corpus), out=out, quiet=True)
    assert path in str(caught.value)
    assert "disk is full" in str(caught.value)
    resume(out, quiet=True)
    assert_same_run(unbroken, out)


def test_a_file_size_limit_in_a_process_of_its_own(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """No stand-in: the system itself refuses the write, here while the first checkpoint is saved."""
    config = write_config(recipe(corpus), tmp_path / "config.json")
    out = tmp_path / "run"
    size = (checkpoints(unbroken)[0] / "model.safetensors").stat().st_size
    assert finish(config, out, file_size_limit=size - 1000) == FAILED
    message = Path(f"{out}.log").read_text().strip().splitlines()[-1]
    assert str(out / "checkpoints" / "step-00000002") in message
    assert "cannot be written" in message
    assert list((out / "checkpoints").iterdir()) == []
    assert finish(config, out) == FINISHED
    assert_same_run(unbroken, out)


def poison(monkeypatch: pytest.MonkeyPatch, step: int, name: str, kind: str) -> None:
    """Before `step`, put a NaN into the weight `name`, or into its gradient."""
    original = run_module.Trainer.step

    def poisoned(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state.step + 1 == step:
            parameter = trainer.parameters[name]
            if kind == "weight":
                parameter.data.view(-1)[0] = math.nan
            else:
                parameter.register_hook(lambda gradient: gradient * math.inf)
        return original(trainer, *arguments)

    monkeypatch.setattr(run_module.Trainer, "step", poisoned)


@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_a_nan_stops_the_run_and_names_step_batch_and_tensor(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, name = tmp_path / "run", "blocks.1.feed_forward.experts.down_proj"
    poison(monkeypatch, 4, name, kind)
    with pytest.raises(TrainingError) as caught:
        train(recipe(corpus), out=out, quiet=True)
    message = str(caught.value)
    assert "step 4 is not finite" in message
    assert "sequences 12 to 15" in message
    assert f"{kind} of {name}" in message
    assert "Lower optimizer.learning_rate" in message
    assert str(out) in message
    failure = json.loads((out / "failure.json").read_text())
    assert (failure["step"], failure["position"]) == (4, 12)
    assert name in failure["message"]
    assert not (out / "summary.json").exists()
    assert [record["step"] for record in steps(out)] == [1, 2, 3]
    assert load_latest(out / "checkpoints").state["step"] == 3


def test_after_a_passing_nan_the_run_goes_on_to_the_same_end(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, 4, "head.weight", "gradient")
        with pytest.raises(TrainingError):
            train(recipe(corpus), out=out, quiet=True)
    assert all(torch.isfinite(parameter).all() for parameter in load_model(out).parameters())
    resume(out, quiet=True)
    assert_same_run(unbroken, out)


def test_a_diverging_run_leaves_a_model_that_opens(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus, optimizer={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match="is not finite"):
        train(raw, out=tmp_path / "run", quiet=True)
    load_model(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "run") if record["kind"] == "step")
