"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.published import V3, publish
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.storage.workspace import check_apart, workspace
from finemoe.core.errors import CheckpointError, RunError


def interrupted(out: Path, error: BaseException) -> None:
    """Work that ends in the middle."""
    with workspace(out, "s", 10) as folder:
        (folder / "file").write_text("x")
        raise error


def test_a_workspace_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(CheckpointError, match="no good"):
        interrupted(out, CheckpointError("no good"))
    assert list(tmp_path.iterdir()) == []
    for interruption in (KeyboardInterrupt, RunError):
        with pytest.raises(interruption):
            interrupted(out, interruption())
        assert [path.name for path in out.parent.iterdir()] == ["out.partial"]
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"), workspace(out, "t", 10):
        pass
    with workspace(out, "s", 10) as folder:
        assert (folder / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda out: out.write_text("x"), "exists already"),
        (lambda out: (out / "x").mkdir(parents=True), "exists already"),
        (lambda out: (out / "manifest.json").mkdir(parents=True), "is complete already"),
        (lambda out: Path(f"{out}.partial/x").mkdir(parents=True), "in the way"),
        (lambda out: out.with_name("out.partial").touch(), "in the way"),
    ],
)
def test_a_workspace_takes_nobodys_place(tmp_path: Path, prepare: Callable[[Path], Any], reason: str) -> None:
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=reason), workspace(tmp_path / "out", "s", 10):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_a_place_to_write_to(tmp_path: Path) -> None:
    with workspace(tmp_path, "s", 10) as folder:
        (folder / "x").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_too_small_is_known_before(tmp_path: Path) -> None:
    message = r"not enough disk: [0-9.]+ GB are needed and [0-9.]+ GB are free"
    with pytest.raises(CheckpointError, match=message), workspace(tmp_path / "out", "s", 1 << 60):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "out", "reason"),
    [
        ("model", "model/out", "lies in the source model, which is never written to"),
        ("model", "model/../model/out", "lies in the source"),
        ("model", "link/out", "lies in the source"),
        ("link", "model/a/b.gguf", "lies in the source link"),
        ("model", "model", "is the source model itself"),
        ("model", "link", "is the source"),
        ("model", "./other/../model", "is the source"),
        ("model.gguf", "model.gguf", "is the source"),
        ("model.gguf", "model.gguf/out", "lies in the source"),
        ("home/model", "home", "the source home/model lies in it"),
        ("out.partial", "out", "is made in out.partial beside it, where the source out.partial lies"),
    ],
)
def test_source_and_place_are_apart_or_refused_by_the_names_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "other", "home/model", "out.partial"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("model")
    Path("model.gguf").touch()
    with pytest.raises(CheckpointError, match=reason) as refused:
        check_apart(source, out)
    assert str(refused.value).startswith(f"{out}: ")
    check_apart(source, "elsewhere")
    check_apart(source, f"{source}-again")


def test_what_is_needed_is_asked_for_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the tensors and their lines; a test disk with just that holds an import and exports of it."""
    source = publish(tmp_path / "source", V3, shards=2)
    size = sum(file.stat().st_size for file in source.iterdir())
    steps: list[tuple[Callable[..., Any], Path, Path]] = [
        (import_hf, source, tmp_path / "ours"),
        (export_hf, tmp_path / "ours", tmp_path / "theirs"),
    ]
    for convert, given, out in steps:
        usage = shutil.disk_usage(tmp_path)
        asked: list[int] = []

        def refuse(_: Any, usage: Any = usage, asked: list[int] = asked) -> Any:
            return usage._replace(free=asked[0] if asked else 0)

        monkeypatch.setattr(shutil, "disk_usage", refuse)
        with pytest.raises(CheckpointError, match=r"([0-9.]+) MB are needed") as refused:
            convert(given, out, quiet=True)
        asked.append(int(float(str(refused.value).split("disk: ")[1].split()[0]) * 1e6) + 10_000)
        convert(given, out, quiet=True)
        used = sum(file.stat().st_blocks * 512 for file in out.iterdir())
        assert used <= asked[0] < used + (1 << 20) + size // 4
        monkeypatch.undo()
