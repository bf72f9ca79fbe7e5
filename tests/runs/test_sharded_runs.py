"""Runs of one process whose checkpoints are in pieces: everything that opens a run opens them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.checkpoint.conversion import export
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.open import load_model, load_tensors
from finemoe.checkpoint.run_state import pieces
from finemoe.checkpoint.run_state.state import METHOD, MODEL, OPTIMIZER, find_damage, load_latest, read_part
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.logs import read_json_lines
from finemoe.runs.run import resume, train
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, recipe, records, stop_after

SHARDED = {"checkpoint_format": "sharded", "keep_checkpoints": 9}
PIECES = ["model-rank00000.safetensors", "optimizer-rank00000.safetensors"]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = recipe(corpus, "v3", training={"keep_checkpoints": 9})
    return train(raw, out=tmp_path_factory.mktemp("whole") / "run", quiet=True).directory


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = recipe(corpus, "v3", training=SHARDED)
    return train(raw, out=tmp_path_factory.mktemp("sharded") / "run", quiet=True).directory


def require_same(one: Path, other: Path) -> None:
    for part in (MODEL, OPTIMIZER):
        ours, theirs = read_part(one, part), read_part(other, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_they_hold_the_same_bits(whole: Path, sharded: Path) -> None:
    assert records(whole) == records(sharded)
    for one, other in zip(checkpoints(whole), checkpoints(sharded), strict=True):
        assert sorted(path.name for path in other.glob("*.safetensors")) == PIECES
        require_same(one, other)
    noted = [
        [(one["step"], one["bytes"], one["in_background"]) for one in read_json_lines(run / "metrics.jsonl")
         if one["kind"] == "checkpoint"]
        for run in (whole, sharded)
    ]  # fmt: skip
    assert noted[0] == noted[1]


def test_a_run_of_many_processes_begins_with_them(whole: Path, sharded: Path) -> None:
    """It reads one tensor after the other, by a way of its own."""
    expected, found = (dict(load_tensors(run)[1]) for run in (whole, sharded))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_everything_that_opens_a_run_opens_them(whole: Path, sharded: Path, tmp_path: Path) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(load_model(whole)(tokens).hidden, load_model(sharded)(tokens).hidden)
    narrow = load_model(checkpoints(sharded)[0], dtype=torch.bfloat16)
    assert narrow.embedding.weight.dtype == torch.bfloat16
    for run in (whole, sharded):
        export(run, tmp_path / run.parent.name, quiet=True)
    ours, theirs = (tmp_path / run.parent.name / "model.safetensors" for run in (sharded, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    for path in (sharded, checkpoints(sharded)[0]):
        assert examine(path, deep=True).problems == ()


def test_a_run_goes_on_with_either(corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = recipe(corpus, "v3", training=SHARDED)
    stop_after(monkeypatch, 3)
    assert train(raw, out=tmp_path / "run", quiet=True).interrupted
    assert not resume(tmp_path / "run", overrides=["training.checkpoint_format=whole"], quiet=True).interrupted
    assert (checkpoints(tmp_path / "run")[-1] / MODEL).exists()
    assert_same_run(whole, tmp_path / "run")
    stop_after(monkeypatch, 3)
    assert train(recipe(corpus, "v3"), out=tmp_path / "other", quiet=True).interrupted
    resume(tmp_path / "other", overrides=["training.checkpoint_format=sharded"], quiet=True)
    assert not (checkpoints(tmp_path / "other")[-1] / MODEL).exists()
    require_same(checkpoints(tmp_path / "other")[-1], checkpoints(whole)[-1])


def test_what_is_written_is_the_state_of_its_step(
    corpus: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two more updates change the weights before a byte of the second step is written."""
    go, original, step = threading.Event(), pieces.save_pieces, Trainer.step

    def save(folder: Path, at: int, *arguments: Any, **named: Any) -> int:
        assert at != 2 or go.wait(30)
        return original(folder, at, *arguments, **named)

    def stepping(trainer: Trainer, *arguments: Any) -> Any:
        report = step(trainer, *arguments)
        if report.step == 4:
            go.set()
        return report

    monkeypatch.setattr(pieces, "save_pieces", save)
    monkeypatch.setattr(Trainer, "step", stepping)
    out = train(recipe(corpus, "v3", training=SHARDED), out=tmp_path / "run", quiet=True).directory
    for one, other in zip(checkpoints(out), checkpoints(sharded), strict=True):
        require_same(one, other)


def test_a_second_ctrl_c_gives_up_the_checkpoint_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, original, step = threading.Event(), pieces.write_tensors, Trainer.step

    def write(path: Path, tensors: Any, stop: threading.Event, *arguments: Any) -> Any:
        if (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            begun.set()
            assert stop.wait(30), "nobody told the thread to stop"
        return original(path, tensors, stop, *arguments)

    def interrupt(trainer: Trainer, *arguments: Any) -> Any:
        report = step(trainer, *arguments)
        if report.step == 5:
            assert begun.wait(30)
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(pieces, "write_tensors", write)
    monkeypatch.setattr(Trainer, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(corpus, training=SHARDED), out=tmp_path / "run", quiet=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert find_damage(checkpoints(tmp_path / "run")[0]) is None


def test_an_error_of_the_thread_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pieces, "give_name", full)
    with pytest.raises(RunError, match="step-00000002: the disk is full"):
        train(recipe(corpus, training=SHARDED), out=tmp_path / "run", quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_is_stopped_before_its_first_step_has_nothing_to_save(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that it began with was looked at: nobody reads it whole once more, while the others wait."""
    stop_after(monkeypatch, 3)
    train(recipe(corpus, training=SHARDED), out=tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    looked: list[Path] = []
    monkeypatch.setattr(pieces, "is_there", looked.append)
    monkeypatch.setattr(Trainer, "run", lambda trainer: None)
    assert resume(tmp_path / "run", quiet=True).interrupted
    assert looked == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_pieces_that_others_never_write_are_given_up_when_a_meeting_has_failed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended, step = threading.Event(), Trainer.step

    def stepping(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state.step == 3:
            raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")
        return step(trainer, *arguments)

    monkeypatch.setattr(pieces, "save_pieces", lambda *arguments, **named: int(ended.wait(60)))
    monkeypatch.setattr(Trainer, "step", stepping)
    try:
        with pytest.raises(RuntimeError, match="Timed out"), caplog.at_level(logging.ERROR, "finemoe"):
            train(recipe(corpus, training=SHARDED, parallel={"timeout": 0.1}), out=tmp_path / "run", quiet=True)
        assert "the last checkpoint was given up" in caplog.text
    finally:
        ended.set()


def test_pieces_of_another_model_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name more, or another shape: never broadcast, never left as it was drawn."""
    from finemoe.runs import saving

    stop_after(monkeypatch, 3)
    train(recipe(corpus, training=SHARDED), out=tmp_path / "run", quiet=True)
    held = load_latest(tmp_path / "run" / "checkpoints")
    assert METHOD not in held.model
    for change in ({"embedding.weight": torch.zeros(1, 16)}, {"more": torch.zeros(1)}):
        patched = {**held.model, **change}
        monkeypatch.setattr(saving, "unread", lambda tensors, own=patched: own)
        with pytest.raises(CheckpointError, match="do not fit the configuration"):
            resume(tmp_path / "run", quiet=True)
