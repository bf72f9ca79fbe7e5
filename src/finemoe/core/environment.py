"""What a result was made with: versions, machine, git revision, command; where what can be made again is kept."""

from __future__ import annotations

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
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "git_revision": _git_revision(),
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


def _version(package: str) -> str | None:
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


def _git_revision() -> str | None:
    """Only of a checkout of this very package: an installed wheel may lie inside somebody else's repository."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
