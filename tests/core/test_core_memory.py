"""What memory a process can still have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finemoe.core import memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_available_memory_is_some_of_what_there_is() -> None:
    available = memory.available_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def group(folder: Path, limit: str, used: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - droppable}\ninactive_file {droppable}\n")


def test_every_group_around_the_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUPS", {"": (str(tmp_path), "memory.max", "memory.current", "inactive_file")})
    group(tmp_path, "max", 0, 0)
    group(tmp_path / "outer", "1000", 700, 200)
    group(tmp_path / "outer" / "inner", "900", 100, 0)
    memberships = ["4:cpu:/elsewhere", "0::/outer/inner"]
    assert list(memory._left_in_groups(memberships)) == [800, 500]
    assert list(memory._left_in_groups(["0::/of/the/host"])) == []
    assert list(memory._left_in_groups(["7:cpu:/outer"])) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_group_beyond_its_limit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_left_in_groups", lambda _: [800, -300])
    assert memory.available_bytes() == 0


def test_the_peak_is_the_process_own_and_not_its_parents() -> None:
    parent = """
import subprocess, sys
block = bytearray(b"x" * 400_000_000)
child = "from finemoe.core.memory import peak_bytes; print(peak_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""
    result = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=60)
    assert 1_000_000 < int(result.stdout) < 300_000_000


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages to ask for")
def test_large_pages_are_asked_for_and_contents_stay() -> None:
    script = """
import torch
from finemoe.core.memory import use_huge_pages
tensor = torch.empty(16 << 20, dtype=torch.uint8)
use_huge_pages(tensor.data_ptr(), tensor.nbytes)
tensor.fill_(7)
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(any("hg" in line for line in flags), int(tensor.long().sum()) == 7 << 24)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["True", "True"]
