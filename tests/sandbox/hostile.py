"""What the tests of the sandbox share: limits, a place of its own for each test, and a look at what was left."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from finemoe.sandbox import sandbox
from finemoe.sandbox.sandbox import Execution, Limits, execute

SHORT = Limits(wall_seconds=1.0, cpu_seconds=1, output_bytes=10_000, file_bytes=1 << 20, memory_bytes=256 << 20)
ROOMY = replace(SHORT, wall_seconds=10.0, cpu_seconds=10)  # where the end comes from elsewhere than the clock
SLACK = 8.0  # seconds for starting and clearing up on a busy machine

WHY = sandbox.supported()
SUPPORTED = pytest.mark.skipif(WHY is not None, reason=str(WHY))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")


@cache
def active() -> dict[str, bool]:
    return {name: state.startswith("active") for name, state in sandbox.layers().items()}


def need(*names: str) -> None:
    missing = [name for name in names if not active().get(name)]
    if missing:
        pytest.skip(f"layers that are missing here: {missing}")


def started_in(folder: Path) -> list[str]:
    """The command lines of living processes that name `folder`: every process of a sandbox does."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes make their folders; afterwards no file and no process may be left."""
    folder = tmp_path / "sandboxes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    assert started_in(folder) == []
    assert not list(Path("/dev/shm").glob("hostile-*"))


def run(program: str, limits: Limits = ROOMY, stdin: str = "") -> Execution:
    begun = time.monotonic()
    done = execute(program, limits, stdin)
    assert time.monotonic() - begun < limits.wall_seconds + SLACK
    return done
