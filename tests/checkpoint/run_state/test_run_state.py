"""Checkpoints on their own: written whole, checked when read, the last few kept."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finemoe.checkpoint.run_state import state as run_state
from finemoe.checkpoint.run_state.state import RunState, find_damage, load_latest, load_model, load_weights, save
from finemoe.checkpoint.storage import streaming
from finemoe.checkpoint.storage.streaming import AbandonedError
from finemoe.core import files
from finemoe.core.config import to_json
from finemoe.core.errors import CheckpointError, RunError
from oracles.models import build, small_config


def state(step: int) -> RunState:
    """Something small whose every part tells the step."""
    return RunState(
        model={"weight": torch.full((3, 4), float(step))},
        optimizer={"weight/exp_avg": torch.full((3, 4), step / 2), "weight/step": torch.tensor(float(step))},
        state={"step": step, "tokens": 8 * step, "position": step, "seconds": 0.5, "threads": 1},
        config=f'{{"step": {step}}}',
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty": empty,
    "missing": Path.unlink,
}
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7, state(7), keep=2)
    assert folder.name == "step-00000007"
    assert names(folder) == sorted(FILES)
    loaded = load_latest(tmp_path / "checkpoints")
    assert torch.equal(loaded.model["weight"], state(7).model["weight"])
    assert {key: value.tolist() for key, value in loaded.optimizer.items()} == {
        key: value.tolist() for key, value in state(7).optimizer.items()
    }
    assert loaded.state == state(7).state
    assert loaded.config == '{"step": 7}'


def test_without_optimizer_state_too(tmp_path: Path) -> None:
    save(tmp_path, 0, RunState({"weight": torch.ones(1)}, {}, state(0).state, "{}"), keep=1)
    assert load_latest(tmp_path).optimizer == {}


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, state(step), keep=3)
    assert names(tmp_path) == ["step-00000002", "step-00000010", "step-00000011"]


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, state(3), keep=1)
    before = folder.stat().st_ino
    assert save(tmp_path, 3, state(3), keep=1).stat().st_ino == before


def test_leftovers_of_a_killed_process_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".writing-12345").mkdir()
    (tmp_path / ".writing-12345" / "model.safetensors").write_text("half")
    save(tmp_path, 1, state(1), keep=1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step), keep=2)
    DAMAGES[damage](tmp_path / "step-00000002" / file)
    assert find_damage(tmp_path / "step-00000002") is not None
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert load_latest(tmp_path).state == state(1).state
    assert "step-00000002 is damaged" in caplog.text
    assert file in caplog.text or file == "manifest.json"


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 3}', '{"files": {"state.json": {}}}', "null"])
def test_a_manifest_that_says_something_else_is_damage(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1, state(1), keep=1)
    (folder / "manifest.json").write_text(text)
    assert "manifest.json: damaged" in str(find_damage(folder))


def test_a_manifest_that_leaves_a_file_out_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, state(1), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_damage(folder) is not None


def test_all_damaged_or_none_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to open, there is none"):
        load_latest(tmp_path)
    for step in (1, 2):
        flip(save(tmp_path, step, state(step), keep=2) / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint to open, all 2 are damaged"):
        load_latest(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_future_does_not_displace_a_good_past(tmp_path: Path, keep: int) -> None:
    for step in (4, 8):
        save(tmp_path, step, state(step), keep=2)
    flip(tmp_path / "step-00000008" / "state.json")
    save(tmp_path, 6, state(6), keep=keep)  # a run resumed from step 4
    assert load_latest(tmp_path).state == state(6).state
    assert names(tmp_path) == ["step-00000004", "step-00000006"][-keep:]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, state(5), keep=1)
    flip(folder / "model.safetensors")
    assert find_damage(save(tmp_path, 5, state(5), keep=1)) is None


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("_write", OSError(errno.ENOSPC, "No space left on device")),
        ("sync", OSError(errno.EDQUOT, "Disk quota exceeded")),
        ("write_tensors", OSError(errno.ENOSPC, "No space left on device")),
        ("write_bytes", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_an_error_with_the_path_and_spares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    save(tmp_path, 1, state(1), keep=2)

    def full(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(run_state, function, full)
        with pytest.raises(RunError, match=r"step-00000002: the disk is full; free some space.*finemoe resume"):
            save(tmp_path, 2, state(2), keep=2)
    assert load_latest(tmp_path).state == state(1).state
    assert names(tmp_path) == ["step-00000001"]


def test_it_gets_its_name_after_everything_else(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        [unnamed] = tmp_path.iterdir()
        assert unnamed.name.startswith(".writing-")
        seen.append(find_damage(unnamed))

    save(tmp_path, 1, state(1), keep=1, before_naming=look)
    assert seen == [None]  # all files were there, and as the manifest says


def test_what_fails_before_the_name_is_given_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise RunError("metrics.jsonl: the disk is full")

    save(tmp_path, 1, state(1), keep=2)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        save(tmp_path, 2, state(2), keep=2, before_naming=fail)
    assert names(tmp_path) == ["step-00000001"]


def test_writing_that_is_told_to_stop_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, pieces = threading.Event(), 0

    class Watched(threading.Event):
        """Asked before each piece; set after the third."""

        def is_set(self) -> bool:
            nonlocal pieces
            pieces += 1
            return pieces > 3

    monkeypatch.setattr(streaming, "_PIECE_BYTES", 8)
    save(tmp_path, 1, state(1), keep=2, stop=stop)
    with pytest.raises(AbandonedError):
        save(tmp_path, 2, state(2), keep=2, stop=Watched())
    assert pieces == 4
    assert names(tmp_path) == ["step-00000001"]


def test_a_kill_between_any_two_system_calls_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut `save` short after its first, second ... change of the file system, and look."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the slow part, and nobody cuts the power
    left = 0

    def mortal(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return original(*arguments, **named)

        return call

    survived = None
    for moment in range(40):
        folder = tmp_path / str(moment)
        for step in (1, 2):
            save(folder, step, state(step), keep=2)
        flip(folder / "step-00000002" / "state.json")
        left = moment
        with monkeypatch.context() as patched:
            for module, name in ((os, "mkdir"), (os, "rename"), (os, "rmdir"), (os, "unlink")):
                patched.setattr(module, name, mortal(getattr(module, name)))
            patched.setattr(os, "fsync", mortal(os.fsync))
            for name in ("write_tensors", "write_bytes"):
                patched.setattr(run_state, name, mortal(getattr(run_state, name)))
            try:
                save(folder, 2, state(2), keep=1)
                survived = moment
            except Killed:
                pass
        assert load_latest(folder).state["step"] in (1, 2)
        save(folder, 3, state(3), keep=1)
        assert names(folder) == ["step-00000003"]
        if survived is not None:
            break
    assert survived is not None
    assert survived > 10  # there was something to interrupt


def test_load_model_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    config = small_config()
    model = build(config)
    text = json.dumps({"model": json.loads(to_json(config))})
    run = RunState(model.state_dict(), {}, {"step": 1}, text)
    folder = save(tmp_path / "checkpoints", 1, run, keep=1)
    tokens = torch.randint(config.vocab_size, (2, 5))
    expected = model.eval()(tokens).hidden
    for path in (tmp_path, folder, str(folder)):
        opened = load_model(path)
        assert not opened.training
        assert torch.equal(opened(tokens).hidden, expected)


def test_load_model_refuses_other_folders_and_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nor a run with a checkpoint"):
        load_model(tmp_path)
    flip(save(tmp_path / "checkpoints", 1, state(1), keep=1) / "model.safetensors")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_named(change: str) -> None:
    model = build(small_config())
    tensors = dict(model.state_dict())
    if change == "missing":
        del tensors["head.weight"]
    elif change == "extra":
        tensors["head.bias"] = torch.zeros(1)
    else:
        tensors["head.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"(?s)here: the weights do not fit the configuration.*head\."):
        load_weights(model, tensors, "here")


def test_write_text_replaces_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    files.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(RunError, match=r"summary\.json: the disk is full"):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["summary.json"]
    with pytest.raises(RunError, match="cannot be written"):
        files.write_text(tmp_path / "nowhere" / "x", "new")
    shutil.rmtree(tmp_path)
