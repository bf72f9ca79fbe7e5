"""A folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.checkpoint.storage.workspace import workspace
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
