"""What a result was made with: versions, machine, git revision, command; where what can be made again is kept."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("finemoe", "torch", "numpy", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Package versions, Python, processor, memory and the git revision of the source, where there is one."""
    return {
        "packages": {name: package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "git_revision": git_revision(),
    }


def command_line() -> str:
    """The `finemoe` command that runs, for a result to be repeated by; empty where Python called."""
    program = Path(sys.argv[0] if sys.argv else "")  # an embedded Python has no argv
    if program.stem != "finemoe" and program.parent.name != "finemoe":  # the script, or python -m finemoe
        return ""
    return shlex.join(["finemoe", *sys.argv[1:]])


def cache_folder() -> Path:
    """Where what can be made again is kept: $FINEMOE_CACHE, or ~/.cache/finemoe."""
    return Path(os.environ.get("FINEMOE_CACHE") or "~/.cache/finemoe").expanduser()


def package_version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the processor, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> tuple[int, str]:
    """How many cores this process may use at once, and what says so."""
    every = os.cpu_count() or 1
    cores, reason = every, f"all {every} of the machine" if every > 1 else "the machine has one"
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            if (allowed := len(os.sched_getaffinity(0))) < cores:
                cores, reason = allowed, f"{allowed} of the machine's {every} are given to this process"
    quota = _quota()
    if quota is not None and quota < cores:
        cores, reason = max(1, int(quota)), f"a control group allows {quota:g} of the machine's {every}"
    return cores, reason


def _quota() -> float | None:
    """Cores' worth of time that a control group allows; None: as much as there is."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:  # the kernel's first interface
        folder = Path("/sys/fs/cgroup/cpu")
        limit, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def git_revision() -> str | None:
    """Only of a checkout of this very package: an installed wheel may lie inside somebody else's repository."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
