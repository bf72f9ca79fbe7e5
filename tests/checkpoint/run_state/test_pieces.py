"""Checkpoints in pieces on their own: the format is torch's, nothing is missing or twice there, damage is found."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from checkpoint.run_state.test_run_state import flip, names, truncate
from finemoe.checkpoint.run_state import pieces
from finemoe.checkpoint.run_state.pieces import save_pieces
from finemoe.checkpoint.run_state.state import METHOD, MODEL, RunState, find_damage, load_latest, read_part
from finemoe.checkpoint.storage.pieces import Place, open_pieces, said_of
from finemoe.checkpoint.storage.streaming import AbandonedError, write_tensors
from finemoe.core.errors import CheckpointError, RunError

FILES = ["model-rank00000.safetensors", "optimizer-rank00000.safetensors", "state.json", "config.json", "manifest.json"]
WHOLE = {
    "matrix": torch.arange(30.0).reshape(6, 5),
    "stack": torch.arange(48, dtype=torch.bfloat16).reshape(6, 4, 2),
    "scalar": torch.tensor(3.0),
}


def state(step: int, **method: Tensor) -> RunState:
    """Something small whose every part tells the step; one process holds all of it."""
    held = ({"weight": torch.full((3, 4), float(step))}, {"weight/step": torch.tensor(float(step))}, method)
    return RunState(
        model=held[0],
        optimizer=held[1],
        state={"step": step, "tokens": 8 * step, "position": step, "seconds": 0.5, "threads": 1},
        config=f'{{"step": {step}}}',
        method=held[2],
        places=tuple({name: Place(0, tuple(one.shape)) for name, one in part.items()} for part in held),
    )


def written(folder: Path, *cuts: int) -> list[Path]:
    """WHOLE in files of so many rows each."""
    files, first = [], 0
    for number, rows in enumerate(cuts):
        own = {name: one[first : first + rows] for name, one in WHOLE.items() if one.ndim}
        places = {name: Place(first, tuple(WHOLE[name].shape)) for name in own}
        if number == 0:
            own["scalar"], places["scalar"] = WHOLE["scalar"], Place(0, ())
        files.append(folder / f"model-rank{number:05d}.safetensors")
        write_tensors(files[-1], own, None, said_of(places))
        first += rows
    return files


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    nbytes = save_pieces(tmp_path, 7, state(7, **{"mask/kept": torch.ones(2)}), 2, None)
    assert nbytes == 4 * (12 + 1 + 2)
    assert names(tmp_path / "step-00000007") == sorted([*FILES, "method-rank00000.safetensors"])
    loaded = load_latest(tmp_path)
    assert torch.equal(loaded.model["weight"], torch.full((3, 4), 7.0))
    assert {key: one.tolist() for key, one in loaded.optimizer.items()} == {"weight/step": 7.0}
    assert {key: one.tolist() for key, one in loaded.method.items()} == {"mask/kept": [1.0, 1.0]}
    assert (loaded.state, loaded.config) == (state(7).state, '{"step": 7}')


def test_the_last_ones_are_kept_and_nothing_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / ".writing-12345").mkdir()
    for step in (1, 2, 10):
        save_pieces(tmp_path, step, state(step), 2, None)
    assert names(tmp_path) == ["step-00000002", "step-00000010"]
    before = (tmp_path / "step-00000010").stat().st_ino
    assert save_pieces(tmp_path, 10, state(10), 2, None) == 0
    assert (tmp_path / "step-00000010").stat().st_ino == before
    flip(tmp_path / "step-00000010" / FILES[0])
    save_pieces(tmp_path, 10, state(10), 2, None)
    assert find_damage(tmp_path / "step-00000010") is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    for step in (1, 2):
        save_pieces(tmp_path, step, state(step), 2, None)
    DAMAGES[damage](tmp_path / "step-00000002" / file)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert load_latest(tmp_path).state == state(1).state
    assert "step-00000002 is damaged" in caplog.text
    assert file in caplog.text or file == "manifest.json"


def test_processes_that_look_together_look_at_every_file_once(tmp_path: Path) -> None:
    save_pieces(tmp_path, 1, state(1), 1, None)
    for file in FILES[:-1]:
        copy = shutil.copytree(tmp_path / "step-00000001", tmp_path / file)
        flip(copy / file)
        found = [find_damage(copy, (number, 3)) for number in range(3)]
        assert found.count(None) == 2
        assert file in str([one for one in found if one is not None])
        truncate(copy / file)
        assert None not in [find_damage(copy, (number, 3)) for number in range(3)]  # sizes are for all to see


def test_damage_that_one_process_finds_is_passed_over_by_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save_pieces(tmp_path, step, state(step), 3, None)
    others = iter(["model-rank00001.safetensors: ends early", None, "config.json: gone meanwhile", None, None])
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        found = load_latest(tmp_path, (0, 2), lambda own: [own, next(others)])
    assert found.state["step"] == 1
    assert "step-00000003 is damaged (model-rank00001.safetensors: ends early)" in caplog.text
    assert "step-00000002 is damaged (config.json: gone meanwhile)" in caplog.text


def test_a_piece_that_the_manifest_does_not_name_is_damage(tmp_path: Path) -> None:
    save_pieces(tmp_path, 1, state(1), 1, None)
    folder = tmp_path / "step-00000001"
    shutil.copy(folder / FILES[0], folder / "model-rank00001.safetensors")
    assert "model-rank00001.safetensors" in str(find_damage(folder))


def test_a_file_that_the_manifest_does_not_know_to_be_missing_is_missed(tmp_path: Path) -> None:
    """Whoever removes a file and its line of the manifest leaves a hole in the tensors."""
    save_pieces(tmp_path, 1, state(1), 1, None)
    folder = tmp_path / "step-00000001"
    (folder / FILES[0]).unlink()
    written(folder, 2, 1)
    with pytest.raises(CheckpointError, match=r"of tensor 'matrix' there are 3 rows and not 6: a file is missing"):
        read_part(folder, MODEL)


def test_torch_opens_it(tmp_path: Path) -> None:
    """The files are those of torch.distributed.checkpoint."""
    written(tmp_path, 1, 3, 2)
    target = {name: torch.zeros_like(one) for name, one in WHOLE.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(target[name], one) for name, one in WHOLE.items())


@pytest.mark.parametrize("cuts", [(6,), (1, 3, 2), (2, 2, 2)])
def test_any_rows_are_read_and_no_more(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    folder = open_pieces(written(tmp_path, *cuts)[::-1])
    assert {name: info.shape for name, info in folder.tensors.items()} == {n: tuple(t.shape) for n, t in WHOLE.items()}
    assert folder.nbytes == sum(one.nbytes for one in WHOLE.values())
    assert len(folder.files) == len(cuts)
    for name, one in WHOLE.items():
        assert torch.equal(folder.read(name), one)
    for first in range(7):
        for last in range(first, 7):
            assert torch.equal(folder.read("stack", (slice(first, last),)), WHOLE["stack"][first:last])
    assert torch.equal(folder.read("stack", (4, slice(1, 3))), WHOLE["stack"][4, 1:3])
    assert torch.equal(torch.cat(list(folder.chunks("matrix", max_bytes=40))), WHOLE["matrix"])


def test_a_slice_opens_the_files_that_hold_it(tmp_path: Path) -> None:
    files = written(tmp_path, 1, 3, 2)
    folder = open_pieces(files)
    files[0].unlink()
    assert torch.equal(folder.read("matrix", (slice(1, 6),)), WHOLE["matrix"][1:])
    with pytest.raises(CheckpointError, match=r"rank00000.safetensors: has gone"):
        folder.read("matrix", (slice(0, 1),))


def resaid(path: Path, change: Callable[[dict[str, dict[str, list[int]]]], object]) -> None:
    """The first file with another word on where its pieces lie."""
    places = {name: Place(0, tuple(one.shape)) for name, one in WHOLE.items()}
    table = json.loads(said_of(places)["DCP_SHARDING_INFO"])
    change(table)
    own = {name: one[:3] if one.ndim else one for name, one in WHOLE.items()}
    write_tensors(path, own, None, {"DCP_SHARDING_INFO": json.dumps(table)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("matrix"), "does not say which rows of tensor 'matrix'"),
        (lambda t: t["matrix"].update(saved_offsets=[0, 1]), "does not say which rows of tensor 'matrix'"),
        (lambda t: t["matrix"].update(saved_offsets=[True, 0]), "does not say which rows of tensor 'matrix'"),
        (lambda t: t["matrix"].update(whole_shape=[6, 4]), "does not say which rows of tensor 'matrix'"),
        (lambda t: t["matrix"].update(whole_shape=[7, 5]), "rows of tensor 'matrix' do not continue"),
        (lambda t: t["matrix"].update(saved_offsets=[1, 0]), "rows of tensor 'matrix' do not continue"),
    ],
)
def test_pieces_that_make_no_whole_are_refused(
    tmp_path: Path, change: Callable[[dict[str, dict[str, list[int]]]], object], message: str
) -> None:
    files = written(tmp_path, 3, 3)
    resaid(files[0], lambda table: None)
    assert torch.equal(open_pieces(files).read("matrix"), WHOLE["matrix"])
    resaid(files[0], change)
    with pytest.raises(CheckpointError, match=message):
        open_pieces(files)


def test_rows_that_are_twice_there_are_refused(tmp_path: Path) -> None:
    files = written(tmp_path, 3, 3)
    shutil.copy(files[0], tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match="do not continue"):
        open_pieces([*files, tmp_path / "again.safetensors"])


def test_a_full_disk_is_an_error_with_the_path_and_spares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pieces(tmp_path, 1, state(1), 2, None)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("begin", "write_tensors", "write_rest", "give_name"):
        with monkeypatch.context() as patched:
            patched.setattr(pieces, function, full)
            with pytest.raises(RunError, match=r"step-00000002: the disk is full; free some space.*finemoe resume"):
                save_pieces(tmp_path, 2, state(2), 2, None)
        assert names(tmp_path) == ["step-00000001"]


def test_a_folder_that_only_the_first_process_sees_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "begin", lambda fresh: None)
    with pytest.raises(RunError, match="all machines must see the same files"):
        save_pieces(tmp_path, 2, state(2), 2, None)


def test_writing_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    save_pieces(tmp_path, 1, state(1), 2, None, stop=stop)
    stop.set()
    with pytest.raises(AbandonedError):
        save_pieces(tmp_path, 2, state(2), 2, None, stop=stop)
    assert names(tmp_path) == ["step-00000001"]


def test_every_checkpoint_is_written_under_a_name_of_its_own(tmp_path: Path) -> None:
    """Another machine may take a name that it knows for the folder that it was: the last checkpoint."""
    seen: list[str] = []
    for step in (1, 2):
        look = lambda: seen.extend(one.name for one in tmp_path.glob(".writing-*"))  # noqa: E731
        save_pieces(tmp_path, step, state(step), 2, None, before_naming=look)
    assert len(set(seen)) == 2


def test_a_piece_that_is_there_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pieces(tmp_path, 1, state(1), 2, None)
    older = tmp_path / "step-00000001"
    monkeypatch.setattr(pieces, "begin", lambda fresh: fresh.symlink_to(older))
    with pytest.raises(RunError, match=r"step-00000002: cannot be written: File exists"):
        save_pieces(tmp_path, 2, state(2), 2, None)
    assert find_damage(older) is None


@pytest.mark.parametrize(("damage", "found"), [(truncate, r"has \d+ bytes"), (Path.unlink, "is not to be seen")])
def test_what_the_first_process_does_not_find_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], found: str
) -> None:
    original = pieces.write_tensors

    def elsewhere(path: Path, *arguments: Any) -> Any:
        recorded = original(path, *arguments)
        if path.name == FILES[1]:
            damage(path)
        return recorded

    monkeypatch.setattr(pieces, "write_tensors", elsewhere)
    with pytest.raises(RunError, match=rf"{FILES[1]}: was written with \d+ bytes and {found}"):
        save_pieces(tmp_path, 1, state(1), 1, None)
    assert names(tmp_path) == []


def test_it_gets_its_name_after_everything_else(tmp_path: Path) -> None:
    seen = []

    def look() -> None:
        [unnamed] = tmp_path.iterdir()
        assert unnamed.name.startswith(".writing-")
        seen.append(find_damage(unnamed))

    save_pieces(tmp_path, 1, state(1), 1, None, before_naming=look)
    assert seen == [None]


def test_a_missing_part_of_the_method_is_no_damage(tmp_path: Path) -> None:
    save_pieces(tmp_path, 1, state(1), 1, None)
    assert not list((tmp_path / "step-00000001").glob(f"{METHOD[:6]}*"))
    assert load_latest(tmp_path).method == {}
