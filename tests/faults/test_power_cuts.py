"""Whatever appears under its final name is on the disk as a whole before, and keeps the name through a power cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from faults.power import record
from finemoe.checkpoint.gguf.exporting import export_gguf
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.files import make_folder, write_text

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"


def state(step: int) -> RunState:
    tensors = {"weight": torch.full((3,), float(step))}
    return RunState(tensors, {"moment": torch.zeros(3)}, {"step": step}, "{}", {"reference": torch.ones(2)})


def test_a_checkpoint_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(monkeypatch)
    final = save(tmp_path / "run" / "checkpoints", 1, state(1), keep=2)
    assert len(list(final.iterdir())) == 6
    recorder.assert_appeared_for_good(final)
    for folder in (tmp_path / "run" / "checkpoints", tmp_path / "run"):
        recorder.assert_made_for_good(folder)


def test_a_checkpoint_is_complete_before_it_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics of its steps are synced in between: they must not be younger than the checkpoint."""
    recorder = record(monkeypatch)
    save(tmp_path, 1, state(1), keep=2, before_naming=lambda: recorder.calls.append(("metrics", 0)))
    kinds = [call for call, _ in recorder.calls]
    assert kinds.index("metrics") == kinds.index("rename") - 1


def test_the_checkpoint_that_replaces_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = save(tmp_path, 1, state(1), keep=2)
    (final / "model.safetensors").write_bytes(b"")
    recorder = record(monkeypatch)
    assert save(tmp_path, 1, state(1), keep=2) == final
    recorder.assert_appeared_for_good(final)


def test_a_file_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.json").write_text("old")
    recorder = record(monkeypatch)
    write_text(tmp_path / "summary.json", "new")
    recorder.assert_appeared_for_good(tmp_path / "summary.json")


def test_folders_above_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    for folder in (tmp_path / "a" / "b", tmp_path / "a"):
        recorder.assert_made_for_good(folder)
    recorder.calls.clear()
    make_folder(tmp_path / "a" / "b")
    assert not recorder.calls, "it was there"


def test_an_import_and_both_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(monkeypatch)
    export_hf(FORMATS / "run", tmp_path / "new" / "exported", quiet=True)
    recorder.assert_appeared_for_good(tmp_path / "new" / "exported")
    recorder.assert_made_for_good(tmp_path / "new")
    recorder.calls.clear()
    import_hf(tmp_path / "new" / "exported", tmp_path / "imported", quiet=True)
    recorder.assert_appeared_for_good(tmp_path / "imported")
    pytest.importorskip("gguf")
    recorder.calls.clear()
    export_gguf(FORMATS / "run", tmp_path / "model.gguf", tokenizer=False, quiet=True)
    recorder.assert_appeared_for_good(tmp_path / "model.gguf")


def test_the_recorder_notices_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(monkeypatch)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "a").write_text("a")
    (tmp_path / "fresh").rename(tmp_path / "final")
    with pytest.raises(AssertionError, match="a was not synced"):
        recorder.assert_appeared_for_good(tmp_path / "final")
    shutil.rmtree(tmp_path / "final")
