"""Checkpoints while training goes on: what is written is the state of its step, and nothing that fails is lost."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemoe.checkpoint.run_state.state import find_damage, load_latest
from finemoe.checkpoint.storage import streaming
from finemoe.core import memory
from finemoe.core.errors import RunError, TrainingError
from finemoe.core.logs import JsonLines, read_json_lines
from finemoe.runs import saving
from finemoe.runs.observers import Log
from finemoe.runs.run import resume, train
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, recipe, steps

KEEP_ALL = {"keep_checkpoints": 10}
FULL = "the disk is full"


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps with checkpoints after 2, 4 and 6, all kept."""
    return train(recipe(corpus, training=KEEP_ALL), out=tmp_path_factory.mktemp("unbroken") / "run").directory


def saved_records(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(directory / "metrics.jsonl") if record["kind"] == "checkpoint"]


def in_save(monkeypatch: pytest.MonkeyPatch, first: Callable[[int], object]) -> None:
    """Before a checkpoint is written, in the thread that writes it, call `first` with its step."""
    original = saving.save

    def save(folder: Path, step: int, *arguments: Any, **named: Any) -> Path:
        first(step)
        return original(folder, step, *arguments, **named)

    monkeypatch.setattr(saving, "save", save)


def after_step(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], object]) -> None:
    """Call `then` with the number of each step when it is done, before observers hear of it."""
    original = Trainer.step

    def step(trainer: Trainer, *arguments: Any) -> Any:
        report = original(trainer, *arguments)
        then(report.step)
        return report

    monkeypatch.setattr(Trainer, "step", step)


def hold(monkeypatch: pytest.MonkeyPatch, checkpoint: int, until: int) -> None:
    """Keep the writing of `checkpoint` back until the step `until` is done."""
    go = threading.Event()
    in_save(monkeypatch, lambda step: go.wait(30) if step == checkpoint else None)
    after_step(monkeypatch, lambda step: go.set() if step == until else None)


def fail_at(monkeypatch: pytest.MonkeyPatch, checkpoint: int) -> None:
    def fail(step: int) -> None:
        if step == checkpoint:
            raise RunError(f"step-{step:08d}: {FULL}")

    in_save(monkeypatch, fail)


def assert_clean(directory: Path) -> None:
    """No half-written checkpoint, no damaged one, and no thread left behind."""
    assert all(path.name.startswith("step-") for path in (directory / "checkpoints").iterdir())
    assert all(find_damage(path) is None for path in checkpoints(directory))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_training_goes_on_and_what_is_written_is_the_state_of_its_step(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(monkeypatch, 2, until=4)  # two more updates change the weights in place before a byte is written
    out = train(recipe(corpus, training=KEEP_ALL), out=tmp_path / "run", quiet=True).directory
    assert [path.name for path in checkpoints(out)] == [path.name for path in checkpoints(unbroken)]
    for one, other in zip(checkpoints(out), checkpoints(unbroken), strict=True):
        for file in ("model.safetensors", "optimizer.safetensors"):
            tensors, expected = load_file(one / file), load_file(other / file)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert_same_run(unbroken, out)
    assert_clean(out)


def test_a_second_checkpoint_waits_for_the_first(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []

    def slow(step: int) -> None:
        assert not running
        running.append(step)
        time.sleep(0.1)
        running.pop()

    in_save(monkeypatch, slow)
    every = {"checkpoint_every": 1, **KEEP_ALL}
    out = train(recipe(corpus, training=every), out=tmp_path / "run", quiet=True).directory
    assert len(checkpoints(out)) == 6
    records = saved_records(out)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Steps are shorter than writing: each checkpoint but the last stalls the run until it is written.
    assert sum(record["stall_seconds"] for record in records) > 0.4
    assert_same_run(unbroken, out)
    assert_clean(out)


def test_each_checkpoint_leaves_a_record(unbroken: Path) -> None:
    records = saved_records(unbroken)
    assert [record["step"] for record in records] == [2, 4, 6]
    assert [record["in_background"] for record in records] == [True, True, False]  # nothing goes on beside the last
    for record, folder in zip(records, checkpoints(unbroken), strict=True):
        tensors = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
        assert record["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert record["write_seconds"] > 0
    assert records[2]["stall_seconds"] >= records[2]["write_seconds"]
    total = json.loads((unbroken / "summary.json").read_text())["checkpoint_stall_seconds"]
    assert total == pytest.approx(sum(record["stall_seconds"] for record in records), abs=1e-3)


def test_metrics_are_on_the_disk_before_the_checkpoint_has_its_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "run", []
    original = Log.sync

    def sync(log: Log) -> None:
        seen.append((len(steps(out)), [path.name for path in checkpoints(out)]))
        original(log)

    monkeypatch.setattr(Log, "sync", sync)
    train(recipe(corpus), out=out, quiet=True)
    assert len(seen) == 3
    assert all(logged >= 2 * (i + 1) for i, (logged, _) in enumerate(seen))
    assert [names for _, names in seen] == [[], ["step-00000002"], ["step-00000002", "step-00000004"]]


def test_a_disk_that_is_full_behind_the_run_ends_it_at_the_next_step(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "run", threading.Event()
    with monkeypatch.context() as patched:
        fail_at(patched, 2)
        original = saving.Save._write

        def write(save: saving.Save, *arguments: Any) -> float:
            try:
                return original(save, *arguments)
            finally:
                written.set()

        patched.setattr(saving.Save, "_write", write)
        after_step(patched, lambda step: (written.wait(30), time.sleep(0.05)) if step == 3 else None)
        with pytest.raises(RunError, match=f"step-00000002: {FULL}"):
            train(recipe(corpus), out=out, quiet=True)
    assert [record["step"] for record in steps(out)] == [1, 2, 3]
    assert checkpoints(out) == []
    resume(out, quiet=True)
    assert_same_run(unbroken, out)
    assert_clean(out)


def test_an_error_of_the_last_one_behind_is_raised_before_the_run_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 4)
    hold(monkeypatch, 4, until=6)  # so that nobody can have noticed before the last step
    with pytest.raises(RunError, match=f"step-00000004: {FULL}"):
        train(recipe(corpus), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert load_latest(tmp_path / "run" / "checkpoints").state["step"] == 2


def test_an_error_that_nothing_else_asked_for_is_raised_at_the_exit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    fail_at(monkeypatch, 4)
    in_save(monkeypatch, lambda step: go.wait(30) if step == 4 else None)
    monkeypatch.setattr(saving.Save, "save", lambda save, trainer: go.set())  # itself it would have asked
    with pytest.raises(RunError, match=f"step-00000004: {FULL}"):
        train(recipe(corpus), out=tmp_path / "run", quiet=True)


def test_an_error_behind_a_run_that_ends_badly_is_said(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(log: JsonLines, record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == 3:
            raise OSError(28, "No space left on device")
        original(log, record)

    original = JsonLines.write
    with monkeypatch.context() as patched:
        fail_at(patched, 2)
        hold(patched, 2, until=3)
        patched.setattr(JsonLines, "write", full)
        with caplog.at_level(logging.ERROR, "finemoe"), pytest.raises(RunError, match=r"metrics\.jsonl"):
            train(recipe(corpus), out=tmp_path / "run", quiet=True)
    assert f"step-00000002: {FULL}" in caplog.text
    resume(tmp_path / "run", quiet=True)
    assert_same_run(unbroken, tmp_path / "run")


def test_a_run_that_fails_finishes_what_is_being_written(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.step

    def step(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.state.step == 3:
            raise TrainingError("a loss is not finite.")
        return original(trainer, *arguments)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        in_save(patched, lambda step: time.sleep(0.2))
        patched.setattr(Trainer, "step", step)
        with pytest.raises(TrainingError, match="not finite"):
            train(recipe(corpus, training=KEEP_ALL), out=out, quiet=True)
    assert [path.name for path in checkpoints(out)] == ["step-00000002", "step-00000003"]
    assert (out / "failure.json").exists()
    assert_clean(out)
    resume(out, quiet=True)
    assert_same_run(unbroken, out)


@pytest.mark.parametrize("stop", [2, 3])
def test_ctrl_c_beside_a_checkpoint_leaves_both(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """The step of a checkpoint that is being written is not written again."""
    out, written = tmp_path / "run", []
    original = Trainer.run

    def keep(trainer: Trainer) -> bool:
        trainers.append(trainer)
        return original(trainer)

    trainers: list[Trainer] = []
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", keep)
        in_save(patched, lambda step: (written.append(step), time.sleep(0.2)))
        after_step(patched, lambda step: trainers[0].request_stop() if step == stop else None)
        assert train(recipe(corpus, training=KEEP_ALL), out=out, quiet=True).interrupted
    assert written == sorted({2, stop})
    assert checkpoints(out)[-1].name == f"step-{stop:08d}"
    assert_clean(out)
    assert [record["step"] for record in saved_records(out)] == written
    assert not resume(out, quiet=True).interrupted
    assert_same_run(unbroken, out)


def test_a_second_ctrl_c_gives_up_the_checkpoint_at_once(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "run", threading.Event()
    original, fsync = saving.save, streaming.os.fsync
    stops: list[threading.Event] = []
    syncs: list[int] = []

    def save(folder: Path, step: int, *arguments: Any, **named: Any) -> Path:
        if step == 4:
            stops.append(named["stop"])
        return original(folder, step, *arguments, **named)

    def slow(file: int) -> None:  # a disk that takes as long as it is given, once the second checkpoint is begun
        fsync(file)
        if stops:
            syncs.append(file)
            begun.set()
            assert stops[0].wait(30), "nobody told the thread to stop"

    def interrupt(step: int) -> None:
        if step == 5:
            assert begun.wait(30)
            raise KeyboardInterrupt  # as Python does when the trainer has given the signal back

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save", save)
        patched.setattr(streaming, "_PIECE_BYTES", 64)
        patched.setattr(streaming, "_SYNC_BYTES", 64)
        patched.setattr(streaming.os, "fsync", slow)
        after_step(patched, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(corpus), out=out, quiet=True)
    assert len(syncs) == 1
    assert [path.name for path in checkpoints(out)] == ["step-00000002"]
    assert_clean(out)
    resume(out, quiet=True)
    assert_same_run(unbroken, out)


def test_without_memory_for_a_copy_training_waits_and_says_so_once(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with caplog.at_level(logging.WARNING, "finemoe"):
        regardless = {**KEEP_ALL, "memory_check": False}
        out = train(recipe(corpus, training=regardless), out=tmp_path / "run", quiet=True).directory
    assert caplog.text.count("training stands still while checkpoints are written") == 1
    assert [record["in_background"] for record in saved_records(out)] == [False, False, False]
    assert_same_run(unbroken, out)
