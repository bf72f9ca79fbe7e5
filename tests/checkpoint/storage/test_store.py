"""Safetensors written in parts, in any order and through kills, against the safetensors library."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.storage.drawn import drawn, folder_of, same
from finemoe.checkpoint.storage.layout import TensorSpec
from finemoe.checkpoint.storage.safetensors import DTYPES, TensorFolder, raw_bytes, read_header
from finemoe.checkpoint.storage.store import TensorStore
from finemoe.checkpoint.storage.workspace import workspace
from finemoe.core.errors import CheckpointError, RunError
from runs.forking import CONTEXT

NewStore = Callable[..., TensorStore]


@pytest.fixture
def new_store() -> Iterator[NewStore]:
    """Stores that are closed at the end, which a process that dies does too."""
    with ExitStack() as opened:
        yield lambda *arguments, **named: opened.enter_context(TensorStore(*arguments, **named))


EVERY = {name.lower(): (dtype, (3, 2)) for name, dtype in DTYPES.items()}


def test_every_dtype_is_read_and_written_as_the_library_does(tmp_path: Path, new_store: NewStore) -> None:
    contents = {name: drawn(dtype, *shape) for name, (dtype, shape) in EVERY.items()}
    contents |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "row": drawn(torch.bfloat16, 5)}
    (tmp_path / "theirs").mkdir()
    read = folder_of(tmp_path / "theirs", contents)
    assert set(read.tensors) == set(contents)
    ours = new_store(tmp_path, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in contents.items()])
    for name, tensor in contents.items():
        assert same(read.read(name), tensor)
        assert read.sha256(name) == hashlib.sha256(raw_bytes(tensor)).hexdigest()
        ours.write(name, tensor)
    ours.finish()
    back = load_file(tmp_path / "model.safetensors")
    assert all(same(back[name], tensor) for name, tensor in contents.items())
    again = TensorFolder.open(tmp_path)
    assert all(same(again.read(name), tensor) for name, tensor in contents.items())
    assert all(info.offset % info.dtype.itemsize == 0 for info in again.tensors.values())
    assert read_header(tmp_path / "model.safetensors")[1] == {"format": "pt"}
    assert again.nbytes == sum(tensor.nbytes for tensor in contents.values())


SPECS = [
    TensorSpec("stack", torch.bfloat16, (4, 6, 5)),
    TensorSpec("bias", torch.float32, (7,)),
    TensorSpec("large", torch.float32, (50, 3)),
    TensorSpec("none", torch.float32, (0, 3)),
    TensorSpec("last", torch.float16, (3, 3)),
]
PARTS: list[tuple[str, tuple[Any, ...]]] = [
    *(("stack", (expert, half)) for expert in range(4) for half in (slice(0, 2), slice(2, 6))),
    ("bias", ()),
    *(("large", (slice(row, row + 10),)) for row in range(0, 50, 10)),
    ("none", ()),
    ("last", ()),
]


def whole_tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {spec.name: drawn(spec.dtype, *spec.shape) for spec in SPECS}


def fill(store: TensorStore, parts: list[tuple[str, tuple[Any, ...]]]) -> int:
    """Write the parts that are still to do; their number."""
    contents, count = whole_tensors(), 0
    for name, index in parts:
        if store.facts(name, index) is None:
            store.write(name, contents[name][index], index, where=[name, str(index)])
            count += 1
    return count


def assert_stored(folder: Path) -> None:
    read, contents = TensorFolder.open(folder), whole_tensors()
    assert set(read.tensors) == set(contents)
    assert all(same(read.read(name), contents[name]) for name in contents)


@pytest.mark.parametrize(("shard_bytes", "files"), [(None, 1), (5_000_000_000, 1), (400, 3), (1, 5)])
def test_shards_are_cut_between_tensors(
    tmp_path: Path, shard_bytes: int | None, files: int, new_store: NewStore
) -> None:
    store = new_store(tmp_path, SPECS, shard_bytes=shard_bytes)
    parts = PARTS[:]
    random.Random(0).shuffle(parts)
    fill(store, parts)
    written = store.finish()
    assert_stored(tmp_path)
    assert len([file for file in written if file.name.endswith(".safetensors")]) == files
    for file in written:
        content = (tmp_path / file.name).read_bytes()
        assert (file.nbytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    if files > 1:
        table = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert table["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS)
        assert list(table["weight_map"]) == sorted(spec.name for spec in SPECS)


def test_a_part_may_be_appended_in_pieces(tmp_path: Path, new_store: NewStore) -> None:
    whole = whole_tensors()["large"]
    store = new_store(tmp_path, [SPECS[2]])
    with store.part("large") as part:
        for chunk in whole.split(7):
            part.append(chunk)
        part.facts["note"] = "x"
    assert store.facts("large") == {"note": "x"}
    store.finish()
    assert same(TensorFolder.open(tmp_path).read("large"), whole)


def test_misuse_is_a_defect_of_ours(tmp_path: Path, new_store: NewStore) -> None:
    with pytest.raises(ValueError, match="planned twice"):
        new_store(tmp_path, [SPECS[0], SPECS[0]])
    store = new_store(tmp_path, SPECS)
    for tensor, reason in ((torch.ones(7).half(), "planned as"), (torch.ones(8), "more"), (torch.ones(6), "missing")):
        with pytest.raises(ValueError, match=reason):
            store.write("bias", tensor)
    with pytest.raises(ValueError, match=r"part missing|nobody wrote"):
        store.finish()


@pytest.mark.parametrize("cut", range(0, len(PARTS), 3))
@pytest.mark.parametrize("tail", ["", '{"tensor": "sta', "\x00\x00\x00\n"])
def test_what_was_written_is_not_written_again(tmp_path: Path, cut: int, tail: str, new_store: NewStore) -> None:
    first = new_store(tmp_path, SPECS, shard_bytes=400)
    fill(first, PARTS[:cut])  # and the process dies
    with (tmp_path / ".model.journal").open("a") as journal:
        journal.write(tail)
    second = new_store(tmp_path, SPECS, shard_bytes=400)
    assert all(second.facts(name, index) == {"where": [name, str(index)]} for name, index in PARTS[:cut])
    half = fill(second, PARTS[:-1])
    third = new_store(tmp_path, SPECS, shard_bytes=400)
    assert half + fill(third, PARTS) == len(PARTS) - cut
    third.finish()
    assert_stored(tmp_path)


def test_what_a_power_cut_took_is_written_again(tmp_path: Path, new_store: NewStore) -> None:
    first = new_store(tmp_path, SPECS)
    fill(first, PARTS)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 200)  # the journal came to the disk, the end of the file did not
    os.truncate(path, path.stat().st_size + 200)
    second = new_store(tmp_path, SPECS)
    assert 0 < fill(second, PARTS) < len(PARTS)
    second.finish()
    assert_stored(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        ('"start"', '"stbrt"'),
        ('"tensor":"bias"', '"tensor":"bjas"'),
        ('"facts"', '"fbcts"'),
        ('"bytes":28', '"bytes":"28"'),
        ('"bytes":28', '"bytes":280'),
    ],
)
def test_a_part_whose_line_is_damaged_is_written_again(
    tmp_path: Path, damage: tuple[str, str], new_store: NewStore
) -> None:
    fill(new_store(tmp_path, SPECS), PARTS)
    journal = tmp_path / ".model.journal"
    lines = [line.replace(": ", ":") for line in journal.read_text().splitlines(keepends=True)]
    at = next(i for i, line in enumerate(lines) if '"tensor":"bias"' in line)
    assert damage[0] in lines[at]
    lines[at] = lines[at].replace(*damage)
    journal.write_text("".join([*lines, '{"synced": true}\n']))
    store = new_store(tmp_path, SPECS)
    assert fill(store, PARTS) == 1
    store.finish()
    assert_stored(tmp_path)


@pytest.mark.parametrize("damage", [(r'"crc32":\d+', '"crc32":7'), ('"bytes":28', '"bytes":24')])
def test_a_journal_that_lies_is_said_to_and_the_way_on(
    tmp_path: Path, damage: tuple[str, str], new_store: NewStore
) -> None:
    """Lines that could be true: what they say is found out when all is read back."""
    fill(new_store(tmp_path, SPECS), PARTS)
    journal = tmp_path / ".model.journal"
    lines = [line.replace(": ", ":") for line in journal.read_text().splitlines(keepends=True)]
    at = next(i for i, line in enumerate(lines) if '"tensor":"bias"' in line)
    lines[at], changed = re.subn(*damage, lines[at])
    assert changed == 1
    journal.write_text("".join([*lines, '{"synced": true}\n']))
    store = new_store(tmp_path, SPECS)
    assert fill(store, PARTS) == 0
    with pytest.raises(CheckpointError, match=r"journal .* says: one of them is damaged; give the same command again"):
        store.finish()
    store = new_store(tmp_path, SPECS)
    assert fill(store, PARTS) == len(PARTS)
    store.finish()
    assert_stored(tmp_path)


@pytest.mark.parametrize("change", ["plan", "file", "size", "journal"])
def test_another_plan_or_missing_files_begin_again(tmp_path: Path, change: str, new_store: NewStore) -> None:
    fill(new_store(tmp_path, SPECS[:1] if change == "plan" else SPECS), PARTS[:3])
    if change == "file":
        (tmp_path / "model.safetensors").unlink()
    if change == "size":
        os.truncate(tmp_path / "model.safetensors", 10)
    if change == "journal":
        (tmp_path / ".model.journal").write_text("{}\n")
    store = new_store(tmp_path, SPECS)
    assert fill(store, PARTS) == len(PARTS)
    store.finish()
    assert_stored(tmp_path)


def test_a_lying_disk_is_found_out(tmp_path: Path, new_store: NewStore) -> None:
    store = new_store(tmp_path, SPECS)
    fill(store, PARTS)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xaa")
    with pytest.raises(CheckpointError, match="does not give back what was written"):
        store.finish()


def test_a_full_disk_names_the_path_and_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_store: NewStore
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = new_store(tmp_path, SPECS)
    fill(store, PARTS[:4])
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(RunError, match=r"model\.safetensors: the disk is full; .* the same command again"):
            fill(store, PARTS)
        patched.setattr(os, "posix_fallocate", full)
        (tmp_path / "other").mkdir()
        with pytest.raises(RunError, match="the disk is full"):
            new_store(tmp_path / "other", SPECS)
    again = new_store(tmp_path, SPECS)
    assert fill(again, PARTS) == len(PARTS) - 4
    again.finish()
    assert_stored(tmp_path)


def slow_conversion(out: Path, counted: Path) -> None:
    """A conversion that notes every part it writes; for a process that is killed."""
    contents = whole_tensors()
    with workspace(out, "the source", 1000) as folder, TensorStore(folder, SPECS, shard_bytes=400) as store:
        for name, index in PARTS:
            if store.facts(name, index) is None:
                store.write(name, contents[name][index], index)
                with counted.open("a") as file:
                    file.write("x")
                time.sleep(0.01)
        store.finish()


def test_killed_again_and_again_it_comes_to_the_same_end(tmp_path: Path) -> None:
    out, counted, kills = tmp_path / "out", tmp_path / "counted", 0
    counted.touch()
    for _ in range(20):
        before = counted.stat().st_size
        process = CONTEXT.Process(target=slow_conversion, args=(out, counted))
        process.start()
        while process.is_alive() and counted.stat().st_size < before + 4:
            time.sleep(0.001)
        assert process.pid is not None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if out.exists():
            break
    assert kills >= 3
    assert_stored(out)
    assert counted.stat().st_size <= len(PARTS) + kills  # at most one part a kill was lost
    assert sorted(path.name for path in out.glob("[!.]*")) == sorted(
        [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    )
    assert not (tmp_path / "out.partial").exists()


@given(st.data())
def test_any_plan_written_in_any_order_reads_back(data: st.DataObject) -> None:
    specs = [
        TensorSpec(f"t{i}", data.draw(st.sampled_from(list(DTYPES.values()))), shape)
        for i, shape in enumerate(data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)))
    ]
    contents = {spec.name: drawn(spec.dtype, *spec.shape) for spec in specs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TensorStore(folder, specs, shard_bytes=data.draw(st.sampled_from([1, 40, None]))) as store:
            for spec in data.draw(st.permutations(specs)):
                store.write(spec.name, contents[spec.name])
            store.finish()
        if specs:
            read = TensorFolder.open(folder)
            assert all(same(read.read(name), tensor) for name, tensor in contents.items())
