"""Imports and exports that are killed, fill the disk, or are given again with something else; and their memory."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.huggingface.foreign_folders import listing
from checkpoint.huggingface.published import (
    LLAMA,
    V3,
    V3_FP8,
    contents_of,
    publish,
)
from finemoe.checkpoint.huggingface import importing
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.kinds import is_imported
from finemoe.checkpoint.storage import store
from finemoe.checkpoint.storage.safetensors import TensorFolder, raw_bytes
from finemoe.checkpoint.weights import imported
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.errors import CheckpointError, RunError
from runs.forking import CONTEXT


def test_nothing_is_written_into_the_source_or_over_anything(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", LLAMA)
    before = listing(source)
    with pytest.raises(CheckpointError, match="lies in the source"):
        import_hf(source, source / "imported", quiet=True)
    with pytest.raises(CheckpointError, match=r"is the source .* itself"):
        import_hf(source, source, quiet=True)
    assert listing(source) == before
    done = import_hf(source, tmp_path / "imported", quiet=True).path
    with pytest.raises(CheckpointError, match="is complete already"):
        import_hf(source, done, quiet=True)
    with pytest.raises(CheckpointError, match="lies in the source"):
        export_hf(done, done / "exported", quiet=True)
    read_imported(done, checksums=True)


@pytest.mark.parametrize("part", ["source", "imported"])
def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    source = publish(tmp_path / "source", V3_FP8)
    convert = lambda: import_hf(source, tmp_path / "imported", quiet=True)  # noqa: E731
    if part == "imported":
        convert()
        convert = lambda: export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)  # type: ignore[assignment, return-value] # noqa: E731
    pwrite, count = os.pwrite, 0

    def limited(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > 30:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", limited)
        with pytest.raises(RunError, match="disk is full"):
            convert()
    assert convert().resumed > 0
    if part == "source":
        export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert contents_of(tmp_path / "exported") == contents_of(source)


def work(source: Path, out: Path, counted: Path) -> None:
    """An import, or an export when `source` is an imported folder, slow enough to be killed in the middle."""
    original = store.Part.check_full

    def slow(self: store.Part) -> None:
        with counted.open("a") as file:
            file.write("x")
        time.sleep(0.003)
        original(self)

    store.Part.check_full = slow  # type: ignore[method-assign]
    (export_hf if is_imported(source) else import_hf)(source, out, quiet=True)


def converted_through_kills(source: Path, out: Path, counted: Path) -> int:
    """The number of kills that it took."""
    counted.touch()
    for kills in range(50):
        before = counted.stat().st_size
        process = CONTEXT.Process(target=work, args=(source, out, counted))
        process.start()
        while process.is_alive() and counted.stat().st_size < before + 40:
            time.sleep(0.001)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if out.exists():
            return kills
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError("it never ends")


def test_killed_imports_and_exports_go_on(tmp_path: Path) -> None:
    source, counted = publish(tmp_path / "source", V3_FP8, shards=2), tmp_path / "counted"
    assert converted_through_kills(source, tmp_path / "imported", counted) >= 2
    read_imported(tmp_path / "imported", checksums=True)
    import_hf(source, tmp_path / "straight", quiet=True)
    assert listing(tmp_path / "imported") == listing(tmp_path / "straight")
    assert converted_through_kills(tmp_path / "imported", tmp_path / "exported", counted) >= 2
    assert contents_of(tmp_path / "exported") == contents_of(source)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, after: int) -> None:
    load, count = importing._load, 0

    def limited(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return load(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(importing, "_load", limited)
        with pytest.raises(KeyboardInterrupt):
            import_hf(source, out, quiet=True)


def test_an_interrupted_import_goes_on_only_with_the_same_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = publish(tmp_path / "source", LLAMA)
    interrupt(monkeypatch, source, tmp_path / "imported", 5)
    assert "imported.partial; give the same command again to go on" in caplog.text
    assert not (tmp_path / "imported").exists()
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"):
        import_hf(publish(tmp_path / "other", LLAMA, seed=1), tmp_path / "imported", quiet=True)
    assert import_hf(source, tmp_path / "imported", quiet=True).resumed == 5
    read_imported(tmp_path / "imported", checksums=True)


def test_progress_says_how_much_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("finemoe.core.logs._PLAIN_INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, logger="finemoe"):
        import_hf(publish(tmp_path / "source", LLAMA), tmp_path / "imported")
    assert "importing source: " in caplog.text
    assert "MiB" in caplog.text


def test_memory_is_a_slice_whatever_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices of 4 kB the largest tensor in memory is far below the embedding's 39 kB."""
    largest = 0
    read = TensorFolder.read

    def watched(folder: TensorFolder, name: str, index: Any = ()) -> Tensor:
        nonlocal largest
        tensor = read(folder, name, index)
        largest = max(largest, tensor.nbytes)
        return tensor

    source = publish(tmp_path / "source", {**V3, "vocab_size": 144})
    chunks = TensorFolder.chunks
    monkeypatch.setattr(TensorFolder, "read", watched)
    monkeypatch.setattr(
        TensorFolder,
        "chunks",
        lambda folder, name, index=(), multiple=1: chunks(folder, name, index, max_bytes=4000, multiple=multiple),
    )
    import_hf(source, tmp_path / "imported", quiet=True)
    export_hf(tmp_path / "imported", tmp_path / "exported", quiet=True)
    assert largest <= 4000
    assert contents_of(tmp_path / "exported") == contents_of(source)
    assert imported.MANIFEST == "manifest.json"
    assert len(raw_bytes(torch.ones(2))) == 8
