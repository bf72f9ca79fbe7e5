"""Whatever happens to a checkpoint's bytes, it is converted or refused: no traceback, no hang, no half of a folder."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.huggingface.published import LLAMA, MIXTRAL, V3_FP8, publish
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.checkpoint.weights.imported import read_imported
from finemoe.core.errors import FinemoeError

SECONDS = 20  # for one conversion that takes some milliseconds; the machine may be busy
EXAMPLES = settings().max_examples
FAMILIES = {"llama": LLAMA, "mixtral": MIXTRAL, "v3_fp8": V3_FP8}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published and an imported folder of each family."""
    home, found = tmp_path_factory.mktemp("sound"), {}
    for name, raw in FAMILIES.items():
        found[name] = publish(home / name, raw, shards=2)
        found[f"{name} imported"] = import_hf(found[name], home / f"{name} imported", quiet=True).path
    return found


@contextlib.contextmanager
def damaged_copy(sound: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(sound, Path(name) / "source"))


def convert(source: Path, *, native: bool) -> bool:
    """Import or export; whether it was done. Anything but a whole folder or a refusal fails."""
    out, started = source.parent / "out", time.monotonic()
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    refusal = None
    try:
        (export_hf if native else import_hf)(source, out, quiet=True)
    except FinemoeError as error:
        refusal = str(error)
    assert time.monotonic() - started < SECONDS
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    if refusal is not None:
        assert refusal
        assert [path.name for path in source.parent.iterdir()] == ["source"], f"{refusal} left something behind"
        return False
    TensorFolder.open(out)
    if not native:
        read_imported(out, checksums=True)
    return True


SOUND = st.sampled_from([name + kind for name in FAMILIES for kind in ("", " imported")])


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_flipped_bits_cut_files_and_missing_files(sound: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(SOUND)
    with damaged_copy(sound[name]) as folder:
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(sorted(folder.iterdir())))
            content = bytearray(path.read_bytes())
            kind = data.draw(st.sampled_from(["flip", "cut", "remove", "insert", "head", "zero"]))
            where = data.draw(st.integers(0, max(0, len(content) - 1)))
            if kind == "remove":
                path.unlink()
            elif kind == "cut":
                os.truncate(path, where)
            elif kind == "insert":
                path.write_bytes(content[:where] + data.draw(st.binary(max_size=9)) + content[where:])
            elif content:
                where = where if kind != "head" else where % min(len(content), 2000)
                content[where] = 0 if kind == "zero" else content[where] ^ (1 << data.draw(st.integers(0, 7)))
                path.write_bytes(content)
            if not list(folder.iterdir()):
                break
        convert(folder, native="imported" in name)


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 10**18, 10**40, 0.5, -0.5, 1e-300, 1e300, "", "x"),
        *("\x00", "é", [], [1], {}, {"a": 1}, [[]], [128, 128], "llama", "yarn", "../x", "/", "nan", "I64", "F32"),
    ]
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if here:
        yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*here, key))


def edit(value: Any, place: tuple[Any, ...], kind: str, new: Any) -> None:
    for key in place[:-1]:
        value = value[key]
    if kind == "remove":
        del value[place[-1]]
    elif kind == "rename" and isinstance(value, dict):
        value[str(new)] = value.pop(place[-1])
    else:
        value[place[-1]] = copy.deepcopy(new)


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_edited_json(sound: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(SOUND)
    native = "imported" in name
    with damaged_copy(sound[name]) as folder:
        files = ["config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer_config.json"]
        files += ["source.json", "manifest.json"] if native else ["config.json"] * 3
        path = folder / data.draw(st.sampled_from([file for file in files if (folder / file).exists()]))
        table = json.loads(path.read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            found = list(places(table))
            if found:
                kind = data.draw(st.sampled_from(["set", "set", "remove", "rename"]))
                edit(table, data.draw(st.sampled_from(found)), kind, data.draw(ODD))
        path.write_text(json.dumps(table))
        if native and path.name != "manifest.json":
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"][path.name]["bytes"] = path.stat().st_size
            (folder / "manifest.json").write_text(json.dumps(manifest))
        convert(folder, native=native)


HEADER = st.sampled_from(["dtype", "shape", "data_offsets", "name", "length", "metadata"])


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_edited_headers(sound: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    with damaged_copy(sound[name]) as folder:
        path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        place, kind = (
            data.draw(st.sampled_from(list(places(table)))),
            data.draw(st.sampled_from(["set", "remove", "rename"])),
        )
        edit(table, place, kind, data.draw(ODD | st.lists(st.integers(0, 5000), max_size=3)))
        text = json.dumps(table).encode()
        size = data.draw(st.sampled_from([len(text)] * 9 + [len(text) - 1, 0, 1 << 40]))
        path.write_bytes(size.to_bytes(8, "little") + text + content[8 + length :])
        convert(folder, native=False)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{name} imported" for name in FAMILIES)])
def test_the_sound_ones_are_converted(sound: dict[str, Path], name: str) -> None:
    with damaged_copy(sound[name]) as folder:
        assert convert(folder, native="imported" in name)
