"""Exports of foreign sources, killed at any moment: one workspace, which the same command takes over, and then none."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoint.huggingface.foreign_folders import listing
from checkpoint.huggingface.published import LLAMA, contents_of, publish
from finemoe.checkpoint.conversion import export
from finemoe.checkpoint.gguf import exporting
from finemoe.checkpoint.storage import store, workspace
from finemoe.checkpoint.through_import import passage
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import replacing, write_text
from runs.forking import CONTEXT

pytest.importorskip("gguf")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = publish(tmp_path / "llama", LLAMA)
    (folder / "tokenizer.json").unlink()  # it splits as no GGUF tokenizer does
    return folder


def slowly(source: Path, out: Path, pause: float) -> None:
    """The verb, slow enough to be killed everywhere."""

    def after(function: Any) -> Any:
        def slow(*arguments: Any, **more: Any) -> Any:
            time.sleep(pause)
            done = function(*arguments, **more)
            time.sleep(pause)
            return done

        return slow

    exporting._SYNC_BYTES = 2000
    exporting._write = after(exporting._write)
    store.Part.append = after(store.Part.append)  # type: ignore[method-assign]
    os.rename = after(os.rename)
    for name in ("_dismantle", "_become", "_remove_scaffold"):
        setattr(workspace, name, after(getattr(workspace, name)))
    export(source, out, quiet=True)


def through_kills(source: Path, out: Path, seed: int) -> int:
    """The number of kills that it took, with at most one workspace beside `out` after each."""
    draw = random.Random(seed)
    others = {path.name for path in out.parent.iterdir()}
    for kills in range(200):
        process = CONTEXT.Process(target=slowly, args=(source, out, 0.005))
        process.start()
        process.join(draw.uniform(0.02, 0.3) + 0.04 * kills)  # later and later, so that it ends
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        left = {path.name for path in out.parent.iterdir()} - others
        assert left <= {out.name, f"{out.name}.partial"}
        if process.exitcode == 0:
            assert left == {out.name}
            return kills
        assert process.exitcode == -signal.SIGKILL
        if out.exists():  # it got its name, and was killed right after that: the same command tidies up
            with pytest.raises(CheckpointError, match="already"):
                export(source, out, quiet=True)
            assert {path.name for path in out.parent.iterdir()} - others == {out.name}
            return kills
    raise AssertionError("it never ends")


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_exports_of_a_hugging_face_folder(llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "killed").mkdir()
    out, straight = tmp_path / "killed" / name, tmp_path / f"straight-{name}"
    assert through_kills(llama, out, seed=1) >= 2
    export(llama, straight, quiet=True)
    if out.is_file():
        assert out.read_bytes() == straight.read_bytes()
    else:
        assert contents_of(out) == contents_of(llama)
        assert listing(out) == listing(straight)


def test_an_export_of_a_gguf_file(llama: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "model.gguf", tmp_path / "killed" / "out"
    export(llama, file, dtype="f32", quiet=True)
    out.parent.mkdir()
    assert through_kills(file, out, seed=2) >= 2
    export(file, tmp_path / "straight", quiet=True)
    assert contents_of(out) == contents_of(tmp_path / "straight")


def ended_by(error: BaseException, source: Path, out: Path, **options: Any) -> None:
    """A passage in the middle of which `error` comes."""
    with passage(source, out, options) as way:
        if isinstance(error, CheckpointError):
            error = CheckpointError(f"no good: {way.source} becomes {way.place}")
        raise error


def test_a_finished_import_is_not_made_again(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        ended_by(KeyboardInterrupt(), llama, out)
    assert "out.partial; give the same command again" in caplog.text
    with pytest.raises(CheckpointError, match="with other options"):
        ended_by(KeyboardInterrupt(), llama, out, dtype="bf16")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "source" / "llama").iterdir()}
    with pytest.raises(KeyboardInterrupt):
        ended_by(KeyboardInterrupt(), llama, out)
    again = (tmp_path / "out.partial" / "source" / "llama").iterdir()
    assert {path.name: path.stat().st_mtime_ns for path in again} == stamps
    with pytest.raises(CheckpointError, match=r"no good: \S*/llama becomes \S*/out$"):
        ended_by(CheckpointError(), llama, out)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_two_that_are_alive_do_not_share_a_workspace(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemoe.core.files._PATIENCE_SECONDS", 0.3)
    with passage(llama, tmp_path / "out", {}) as way:
        way.place.mkdir(parents=True)
        with pytest.raises(RunError, match="another process is at work there"):
            ended_by(KeyboardInterrupt(), llama, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        time.sleep(60)


def test_a_killed_writer_of_a_file_leaves_one_place_that_the_next_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old")
    for _ in range(3):
        process = CONTEXT.Process(target=half, args=(path,))
        process.start()
        wait_for(tmp_path / ".results.json.partial")
        process.kill()
        process.join()
        assert sorted(file.name for file in tmp_path.iterdir()) == [".results.json.partial", "results.json"]
        assert path.read_text() == "old"
    write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "new")]


def many(path: Path, text: str) -> None:
    for _ in range(30):
        write_text(path, text)


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = ["a" * 50_000, "b" * 70_000]
    processes = [CONTEXT.Process(target=many, args=(path, text)) for text in texts]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if path.exists():
            assert path.read_text() in texts
    assert [process.exitcode for process in processes] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
