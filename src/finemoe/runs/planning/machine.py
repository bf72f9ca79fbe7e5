"""What a bug report should say of the machine and of what is installed; nothing in it is secret."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from finemoe.core import memory
from finemoe.core.environment import cache_folder, git_revision, package_version, processor, usable_cores

_NEEDED = ("finemoe", "torch", "numpy", "safetensors", "tokenizers", "pydantic", "typer", "rich", "altair",
           "vl-convert-python", "jinja2", "pyarrow", "zstandard", "scipy")  # fmt: skip
_OPTIONAL = ("huggingface-hub", "datasets", "gguf", "transformers", "lm-eval", "math-verify", "tensorboard",
             "wandb", "trackio")  # fmt: skip
_INSTRUCTIONS = re.compile(r"avx|amx|fma$|f16c$|sse4|asimd|neon|sve|bf16")
_VARIABLES = re.compile(r"FINEMOE_|(OMP|MKL|OPENBLAS)_NUM_THREADS$|CUDA_VISIBLE_DEVICES$|TOKENIZERS_PARALLELISM$|CXX$")
_SECRET = re.compile("TOKEN$|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def env() -> dict[str, Any]:
    """Versions, machine, limits, compiler and kernels, cache, variables, accelerators: for a bug report.

    Nothing is compiled and no model is made. The home folder is written `~`, and a variable that looks like a secret
    says only that it is set.
    """
    found: dict[str, Any] = {
        "packages": {name: package_version(name) for name in _NEEDED},
        "optional": {name: known for name in _OPTIONAL if (known := package_version(name)) is not None},
        "python": f"{platform.python_version()} ({sys.executable})",
        "git_revision": git_revision(),
        "system": platform.platform(),
        "processor": _processor(),
        "memory": _memory(),
        "compiler": _compiler(),
        **_torch(),
        "cache": _cache(),
        "variables": {
            name: "(set)" if _SECRET.search(name) else value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.match(name)
        },
    }
    return dict(_without_home(found))


def _without_home(value: Any) -> Any:
    """With the home folder, which often has a person's name, as `~`."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", value) if isinstance(value, str) and len(home) > 1 else value


def _processor() -> dict[str, Any]:
    from finemoe.core.extension import instruction_sets

    cores, reason = usable_cores()
    sets = sorted({word for word in instruction_sets().split() if _INSTRUCTIONS.match(word)})
    return {"name": processor(), "cores": os.cpu_count(), "usable": cores, "because": reason, "instructions": sets}


def _memory() -> dict[str, int | None]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"total": total, "available": memory.available_bytes(), "limit": memory.limit_bytes()}


def _compiler() -> str | None:
    """The first line that the C++ compiler says of itself."""
    from finemoe.core.extension import find_compiler

    path = find_compiler()
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which cannot be run: {error}"
    return f"{said.strip().splitlines()[0]} ({path})" if said.strip() else path


def _torch() -> dict[str, Any]:
    """What torch sees: threads, accelerators; and whether our kernels were built for it."""
    import torch

    from finemoe.core.extension import state_of
    from finemoe.model import native

    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "native_kernels": state_of(native.__name__, native.LIBRARY),
        "threads": torch.get_num_threads(),
        "cuda": {"built_for": torch.version.cuda, "devices": cuda},
        "mps": torch.backends.mps.is_available(),
    }


def _cache() -> dict[str, Any]:
    """The folder of what can be made again, and how large it and its parts are."""
    folder = cache_folder()
    try:
        parts = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        return {"folder": str(folder), "unreadable": error.strerror or str(error)}
    sizes = {part.name: _size(part) for part in parts}
    return {"folder": str(folder), "bytes": sum(sizes.values()), "parts": {k: v for k, v in sizes.items() if v >= 1024}}


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    total = 0
    for file in files:
        try:
            total += file.lstat().st_size
        except OSError:  # another process tidied up
            continue
    return total


def other_work() -> str | None:
    """What else the machine is doing, where it is enough to falsify times: more waits than one run accounts for."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    return f"beside other work (load {load:.1f} on {cores} cores)" if load > cores + 1 else None
