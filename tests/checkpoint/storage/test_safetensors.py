"""Safetensors read by header: parts, damage, memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.storage.drawn import drawn, folder_of, same
from finemoe.checkpoint.storage import safetensors as tensors
from finemoe.checkpoint.storage import store as store_module
from finemoe.checkpoint.storage.safetensors import TensorFolder, span
from finemoe.core.errors import CheckpointError, RunError

INDICES = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(lambda ab: slice(min(ab), max(ab) + 1))


@pytest.mark.parametrize(
    "index",
    [
        *((), (0,), (3,), (2, 4), (1, slice(1, 3)), (slice(0, 4),), (slice(2, 3),), (1, 2, 1)),
        *((slice(1, 1),), (slice(2, None),)),
    ],
)
def test_parts(tmp_path: Path, index: tuple[Any, ...]) -> None:
    whole = drawn(torch.float16, 4, 5, 2)
    read = folder_of(tmp_path, {"x": whole})
    assert same(read.read("x", index), whole[index])
    start, count, shape = span((4, 5, 2), index)
    assert shape == whole[index].shape
    assert same(whole.flatten()[start : start + count], whole[index].flatten())
    for max_bytes in (1, 10, 1000):
        for multiple in (1, 2):
            chunks = list(read.chunks("x", index, max_bytes=max_bytes, multiple=multiple))
            assert same(torch.cat(chunks) if chunks[0].dim() else chunks[0], whole[index])
            assert all(len(chunk) % multiple == 0 for chunk in chunks[:-1])


@pytest.mark.parametrize(
    "index",
    [
        *((4,), (-1,), (0, 0, 0, 0), (slice(0, 2), 1), (slice(0, 4, 2),), (slice(0, 5),), (slice(3, 1),)),
        *((slice(0, 4), slice(0, 1)), (2, slice(0, 6))),
    ],
)
def test_what_is_no_part_is_refused(index: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="index"):
        span((4, 5, 2), index)


def header(entries: Any, *, length: int | None = None, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = b"\x00" * 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated, or not safetensors"),
        (b"\x01\x00\x00", "truncated, or not safetensors"),
        (header({"a": entry()}, length=1 << 40, data=EIGHT), "ends within its header"),
        (b"PK\x03\x04" + b"\x00" * 100, "not safetensors"),
        (header(b"", data=EIGHT), "not valid JSON"),
        (header([]), "holds a JSON list"),
        (header(b'{"a":' * 1000), "levels deep"),
        (header({"a": entry()}), "truncated: "),
        (header({"a": entry()}, data=b"\x00" * 7), "truncated: "),
        (header({"a": entry()}, data=b"\x00" * 9), "more bytes than its header says"),
        (header({}, data=EIGHT), "more bytes than its header says"),
        (header({"a": entry("F99")}, data=EIGHT), "dtype 'F99' is unknown"),
        (header({"a": entry(["F32"])}, data=EIGHT), "is unknown"),
        (header({"a": entry(shape=[3])}, data=EIGHT), "takes 12 bytes, not 8"),
        (header({"a": entry(shape=[-2])}, data=EIGHT), "is not possible"),
        (header({"a": entry(shape=[2.0])}, data=EIGHT), "is not possible"),
        (header({"a": entry(shape=[True, 2])}, data=EIGHT), "is not possible"),
        (header({"a": entry(shape="2")}, data=EIGHT), "is not possible"),
        (header({"a": entry(shape=[1] * 99 + [2])}, data=EIGHT), "is not possible"),
        (header({"a": entry(shape=[0, 1 << 70], offsets=[0, 0])}), "is not possible"),
        (header({"a": entry(offsets=[0, 8, 9])}, data=EIGHT), "not a range of bytes"),
        (header({"a": entry(offsets=[8, 0])}, data=EIGHT), "not a range of bytes"),
        (header({"a": entry(offsets=[0, "8"])}, data=EIGHT), "not a range of bytes"),
        (header({"a": entry(offsets=[1, 9])}, data=EIGHT + b"\x00"), "leaves a gap or overlaps"),
        (header({"a": entry(), "b": entry()}, data=EIGHT), "leaves a gap or overlaps"),
        (header({"a": entry(), "b": entry(offsets=[4, 12])}, data=EIGHT * 2), "leaves a gap or overlaps"),
        (header({"a": entry(), "b": entry(offsets=[12, 20])}, data=EIGHT * 3), "leaves a gap or overlaps"),
        (header({"a": {**entry(), "x": 1}}, data=EIGHT), "exactly its dtype, shape and data_offsets"),
        (header({"a": {"dtype": "F32"}}, data=EIGHT), "exactly its dtype, shape and data_offsets"),
        (header({"a": 3}), "exactly its dtype, shape and data_offsets"),
        (header({"__metadata__": {"a": 1}}), "must be a table of strings"),
        (header({"__metadata__": []}), "must be a table of strings"),
        (header(b'{"a": 1, "a": 2}'), "occurs twice"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        TensorFolder.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_a_header_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 30).to_bytes(8, "little"))
    os.truncate(path, 2 << 30)  # sparse
    with pytest.raises(CheckpointError, match="at most 100000000 are read"):
        TensorFolder.open(tmp_path)


def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    read = folder_of(tmp_path, {"x": torch.ones(10_000)})
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="ends within tensor 'x'"):
        read.read("x")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has gone"):
        read.read("x")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(RunError, match="try again"):
        read.read("x")
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        read.read("y")


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def table(**weights: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    save_file({"x": torch.ones(2)}, tmp_path / a)
    save_file({"y": torch.ones(3), "z": torch.ones(1)}, tmp_path / b)
    table(x=a, y=b, z=b)
    assert {name: info.path.name for name, info in TensorFolder.open(tmp_path).tensors.items()} == {
        "x": a,
        "y": b,
        "z": b,
    }
    assert TensorFolder.open(tmp_path).warnings == ()
    table(x=a, y=b, z=b, w=b)
    absent = TensorFolder.open(tmp_path)  # whoever needs it says so
    assert absent.tensors.keys() == {"x", "y", "z"}
    assert absent.warnings == ("1 tensor is in the index, and in no file: w",)
    table(x=a, y=b, z=a)  # one file holds it, so that nothing is unclear
    astray = TensorFolder.open(tmp_path)
    assert astray.info("z").path.name == b
    assert "not in the file that the index names" in astray.warnings[0]
    for name in (a, "overlay.safetensors"):
        save_file({"x": torch.ones(2), "w": torch.ones(2)}, tmp_path / name)
    table(x=a, y=b, z=b, w=b, v="overlay.safetensors")
    with pytest.raises(CheckpointError, match=r"holds tensor 'w', but it does not, and .* and overlay\.safetensors do"):
        TensorFolder.open(tmp_path)


def test_the_index_says_which_of_several_counts(tmp_path: Path) -> None:
    base, over = "model-00001-of-00001.safetensors", "model-overlay.safetensors"
    save_file({"x": torch.ones(2), "y": torch.ones(3), "old": torch.ones(1)}, tmp_path / base)
    save_file({"x": torch.zeros(2)}, tmp_path / over)
    for file, value in ((base, 1), (over, 0)):
        table = {"weight_map": {"x": file, "y": base, **({"z": over} if file == base else {})}}
        save_file({"x": torch.zeros(2), "z": torch.zeros(1)}, tmp_path / over)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(table))
        opened = TensorFolder.open(tmp_path)
        assert opened.read("x").tolist() == [value, value]
        assert "1 tensor is in several files, and the one that the index names counts: x" in opened.warnings
        # What the index does not name is used by nobody who does not ask for it.
        assert "old" in opened.unlisted
        assert "old" not in opened.tensors
        assert opened.listed({"y"}) is opened
        asked = opened.listed({"old"})
        assert asked.read("old").tolist() == [1]
        assert "missing in the index" in asked.warnings[-1]


def test_equal_numbers_in_any_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 16)
    whole = torch.arange(12.0).view(4, 3)
    other = whole.clone()
    other[3, 2] += 1
    contents = {"a": whole, "b": whole.bfloat16(), "c": other, "d": whole.view(3, 4).clone()}
    save_file(contents, tmp_path / "model.safetensors")
    opened = TensorFolder.open(tmp_path)
    assert [opened.equal("a", name) for name in "abcd"] == [True, True, False, False]


def test_memory_stays_at_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    original = tensors._fill

    def watched(raw: Tensor, *rest: Any) -> None:
        nonlocal largest
        largest = max(largest, raw.numel())
        original(raw, *rest)

    monkeypatch.setattr(tensors, "_fill", watched)
    read = folder_of(tmp_path, {"x": torch.ones(1000, 100)})
    for chunk in read.chunks("x", max_bytes=4000):
        assert chunk.nbytes <= 4000
    assert largest == 4000
    assert store_module.SHARD_BYTES == 5_000_000_000
