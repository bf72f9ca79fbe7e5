"""Foreign folders: what is read, and everything that is refused."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.checkpoint.storage import untrusted as foreign
from finemoe.checkpoint.storage.untrusted import MAX_DEPTH, folder_file, parse_json, read_json, weight_files
from finemoe.core.errors import CheckpointError


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, {"ü [{": '"]}\\'}], "digits": "\\u4e2d", "emoji": "\\ud83d\\ude00"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"7", "holds a JSON int"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' occurs twice"),
        (b'{"x": {"a": 1, "a": 1}}', "key 'a' occurs twice"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"\\udc00": 1}', "not valid JSON"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "levels deep"),
        (b"[" * 1_000_000, "levels deep"),
        (b'{"a":' * 1_000_000, "levels deep"),
    ],
)
def test_json_that_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        parse_json(data, "the file")
    assert str(caught.value).startswith("the file: ")
    assert len(str(caught.value)) < 400


def test_brackets_in_strings_are_no_depth() -> None:
    value = {"a": "[" * 1000 + '\\"' * 1000 + "{" * 1000}
    assert parse_json(json.dumps(value).encode(), "x") == value


@pytest.mark.parametrize("filler", [b'"', b"\\", b'\\"', b'"\\', b"[]", b'"a"'])
def test_the_depth_check_takes_linear_time(filler: bytes) -> None:
    data = b'{"a": "' + filler * (1_000_000 // len(filler))
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        parse_json(data, "x")
    assert time.monotonic() - started < 5


def test_many_empty_lists_are_refused_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MOST_BRACKETS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 lists"):
        parse_json(b'{"a": [' + b"[]," * 1000 + b"[]]}", "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON), st.booleans())
def test_any_good_object_passes(value: dict, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), "x") == value


@given(st.binary(max_size=200) | st.text('{}[]":,\\u0dD8aeE1+-. ntrflse', max_size=200).map(str.encode))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        assert isinstance(parse_json(data, "x"), dict)


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, foreign.CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="such a file has at most"):
        read_json(path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, reason in (("fifo", "regular"), ("folder", "regular"), ("none", "no such file")):
        with pytest.raises(CheckpointError, match=reason):
            read_json(tmp_path / name)
        with pytest.raises(CheckpointError, match=reason):
            folder_file(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\x00", "a\nb", "x" * 300, "\ud800"]
)
def test_only_plain_names_are_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        folder_file(tmp_path, name)


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "real").write_text("x")
    (tmp_path / "outside").write_text("x")
    (folder / "in").symlink_to("real")
    (folder / "out").symlink_to("../outside")
    (folder / "absolute").symlink_to("/etc/hostname")
    (folder / "broken").symlink_to("nothing")
    (folder / "loop").symlink_to("loop")
    assert folder_file(folder, "in").read_text() == "x"
    for name, reason in (
        ("out", "leads out of the folder"),
        ("absolute", "leads out of the folder"),
        ("broken", "link to a file that does not exist"),
        ("loop", "cannot be opened"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            folder_file(folder, name)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)  # the user's own way to the folder
    assert folder_file(linked, "in").read_text() == "x"


def test_the_hub_cache_may_link_into_its_own_blobs(tmp_path: Path) -> None:
    home = tmp_path / "models--x--y"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "123").write_text("x")
    (tmp_path / "models--other--z").mkdir()
    (tmp_path / "models--other--z" / "123").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "theirs").symlink_to("../../../models--other--z/123")
    assert folder_file(snapshot, "config.json").read_text() == "x"
    with pytest.raises(CheckpointError, match="leads out"):
        folder_file(snapshot, "theirs")
    plain = tmp_path / "plain" / "snapshots" / "abc"  # the same shape, but not of the cache
    plain.mkdir(parents=True)
    (plain.parent.parent / "blob").write_text("x")
    (plain / "config.json").symlink_to("../../blob")
    with pytest.raises(CheckpointError, match="leads out"):
        folder_file(plain, "config.json")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def index(folder: Path, table: object) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_single_file(tmp_path: Path) -> None:
    found = weight_files(touch(tmp_path, "model.safetensors", "config.json"))
    assert [path.name for path in found.files] == ["model.safetensors"]
    assert (found.index, found.notes) == (None, ())


def test_shards_and_their_index(tmp_path: Path) -> None:
    found = weight_files(index(touch(tmp_path, A, B), {"x": B, "y": A, "z": A}))
    assert [path.name for path in found.files] == [A, B]
    assert found.index == {"x": B, "y": A, "z": A}


@pytest.mark.parametrize("left", [B, "model-00002-of-000163.safetensors"])
def test_shards_that_the_index_does_not_name_are_not_read(tmp_path: Path, left: str) -> None:
    found = weight_files(index(touch(tmp_path, A, left), {"x": A}))
    assert [path.name for path in found.files] == [A]
    assert found.warnings == (f"{left}: not named in model.safetensors.index.json, not read",)
    assert found.notes == ()


def test_what_is_ignored_is_noted(tmp_path: Path) -> None:
    found = weight_files(touch(tmp_path, "model.safetensors", "extra.safetensors", "pytorch_model.bin", "x.PTH"))
    assert found.notes[0] == "extra.safetensors: not part of the weights, ignored"
    assert "pytorch_model.bin, x.PTH: pickle files are never opened" in found.notes[1]


@pytest.mark.parametrize(
    ("names", "table", "reason"),
    [
        ([], None, "no weights in it"),
        (["pytorch_model.bin"], None, "only pickle weights"),
        (["model.ckpt", "config.json"], None, "only pickle weights"),
        ([A, B], None, "shards but no model.safetensors.index.json"),
        (["model-00001-of-000163.safetensors"], None, "shards but no model.safetensors.index.json"),
        (["weights.safetensors"], None, "weights are called model.safetensors"),
        ([A], {"x": A, "y": B}, "names model-00002-of-00002.safetensors, not in the folder"),
        ([], {"x": A, "y": B}, "and 1 more, not in the folder"),
        ([A, "model.safetensors"], {"x": A}, "unclear which weights count"),
        ([A], {"x": "../" + A}, "only .safetensors files in the folder itself"),
        ([A], {"x": "/etc/" + A}, "only .safetensors files in the folder itself"),
        (["a.bin"], {"x": "a.bin"}, "only .safetensors files in the folder itself"),
        ([A], {"x": "\udc00.safetensors"}, "not valid JSON"),
        ([A], {}, "is empty"),
        ([A], None, "shards but no"),
        ([A], [A], "must say for every tensor"),
        ([A], {"x": 3}, "must say for every tensor"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, names: list[str], table: object, reason: str) -> None:
    touch(tmp_path, *names)
    if table is not None:
        index(tmp_path, table)
    with pytest.raises(CheckpointError, match=reason):
        weight_files(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        weight_files(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        weight_files(touch(tmp_path, "file") / "file")
