"""Building and loading a C++ extension: once, from any number of processes, and never at the cost of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finemoe.core import extension
from finemoe.model import native

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
LOADED = native.available()  # before the cache moves
FLAGS = ("-O1", "-std=c++20", "-fopenmp")
SOURCE = """
#include <torch/library.h>
TORCH_LIBRARY_FRAGMENT(finemoe_test, library) { library.def("NAME(int x) -> int", [](int64_t x) { return x + 1; }); }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "extensions"


def sources(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "one.cpp").write_text(text)
    return folder


@NEEDS_COMPILER
def test_the_kernels_load_where_there_is_a_compiler() -> None:
    assert LOADED


@NEEDS_COMPILER
@pytest.mark.slow
def test_compiled_once_and_again_when_a_source_changes(tmp_path: Path, cache: Path) -> None:
    folder = sources(tmp_path / "src", SOURCE.replace("NAME", "once"))
    assert extension.load("sample", folder, FLAGS) is None
    assert torch.ops.finemoe_test.once(4) == 5
    (built,) = cache.glob("sample-*/sample.so")
    changed = built.stat().st_mtime_ns
    code = f"""
from pathlib import Path
from finemoe.core import extension
import torch
assert extension.load("sample", Path({str(folder)!r}), {FLAGS!r}) is None
assert torch.ops.finemoe_test.once(4) == 5
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert built.stat().st_mtime_ns == changed
    sources(folder, SOURCE.replace("NAME", "another"))
    assert extension.load("sample", folder, FLAGS) is None
    assert len(list(cache.glob("sample-*/sample.so"))) == 2
    assert not list(cache.rglob("*.o"))


@NEEDS_COMPILER
def test_a_source_that_does_not_compile_is_a_reason_and_is_not_tried_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sources(tmp_path / "src", "int f( {")
    reason = extension.load("broken", folder, FLAGS)
    (failure,) = cache.glob("broken-*/failure.txt")
    assert reason == f"they cannot be built here; {failure} says why (delete it to try again)"
    assert "one.cpp:1" in failure.read_text()
    monkeypatch.setattr(extension, "_compile", None)
    assert extension.load("broken", folder, FLAGS) == reason


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert extension.load("sample", tmp_path) == "no C++ compiler was found (install g++ or clang)"


def test_a_compiler_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++-99 -O2")
    assert extension.load("sample", tmp_path) == (
        "CXX is 'g++-99 -O2', which is no program here: unset it, or name a C++ compiler without any options"
    )


def test_any_usual_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "clang++", "exit 0")
    assert extension.find_compiler() == str(tmp_path / "clang++")
    program(tmp_path / "c++", "exit 0")
    assert extension.find_compiler() == str(tmp_path / "c++")


@NEEDS_COMPILER
def test_a_library_cut_short_is_built_again(tmp_path: Path, cache: Path) -> None:
    folder = sources(tmp_path / "src", SOURCE.replace("NAME", "short"))
    compiler = str(shutil.which("c++"))
    flags = extension._flags(FLAGS, compiler)
    built = extension._home("sample", [folder / "one.cpp"], flags, compiler) / "sample.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"\x7fELF")
    assert extension.load("sample", folder, FLAGS) is None
    assert torch.ops.finemoe_test.short(4) == 5
    assert sorted(path.name for path in built.parent.iterdir()) == [".lock", "sample.so"]


@NEEDS_COMPILER
def test_a_library_that_never_loads_is_not_built_again_and_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sources(tmp_path / "src", "int missing(); int one() { return missing(); }")
    reason = extension.load("sample", folder, FLAGS)
    assert reason is not None
    assert "undefined symbol" in reason
    (failure,) = cache.glob("sample-*/failure.txt")
    monkeypatch.setattr(extension, "_compile", None)
    assert extension.load("sample", folder, FLAGS) == (
        f"they cannot be built here; {failure} says why (delete it to try again)"
    )


@pytest.mark.parametrize("ends", ["echo 'x.s: No space left on device'; exit 1", "kill -9 $$"])
def test_a_full_machine_is_no_fault_of_the_sources(
    ends: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    program(tmp_path / "cxx", f'[ "$1" = --version ] && exit 0\n{ends}')
    for _ in range(2):  # what the first leaves does not stop the second
        reason = extension.load("sample", sources(tmp_path / "src", SOURCE), FLAGS)
        assert reason is not None
        assert reason.startswith("the compiler was stopped: ")
        (home,) = cache.iterdir()
        assert [path.name for path in home.iterdir()] == [".lock"]
        (home / "work-killed").mkdir()
        (home / "work-killed" / "one.o").touch()


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@NEEDS_COMPILER
def test_an_unwritable_cache_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path / "file"))
    reason = extension.load("sample", sources(tmp_path / "src", SOURCE), FLAGS)
    assert reason is not None
    assert "Not a directory" in reason or "File exists" in reason


def test_switched_off_nothing_is_loaded_and_results_are_torchs() -> None:
    code = """
import torch
from finemoe.model import native
from finemoe.model.backends import NATIVE
from finemoe.model.projection import Projection
assert not native.available()
layer = Projection(4, 3, NATIVE)
torch.nn.init.normal_(layer.weight)
states = torch.randn(2, 4)
assert torch.equal(layer(states), states @ layer.weight.t())
assert not hasattr(torch.ops.finemoe, "linear_forward")
"""
    environment = {**os.environ, "FINEMOE_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
