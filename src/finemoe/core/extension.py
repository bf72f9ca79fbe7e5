"""A C++ extension of torch: compiled at first use, kept for this machine, never required.

The library lies in the cache under a name made of everything that its contents depend on: sources, flags, compiler,
torch and processor. Of several processes that need it one compiles while the others wait.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from finemoe.core.environment import cache_folder
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import logger

FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_NO_COMPILER = "no C++ compiler was found (install g++ or clang)"
_PATIENCE = 300.0  # seconds to wait for another process that compiles


def switched_off() -> bool:
    """Whether the environment says FINEMOE_NATIVE=0."""
    return os.environ.get("FINEMOE_NATIVE") == "0"


def load_from(package: str, name: str) -> str | None:
    """`load` the C++ files that lie in a Python package, under `name`."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return f"there is no package {package}"
    return load(name, Path(spec.origin).parent)


def load(name: str, folder: Path, flags: Sequence[str] | None = None) -> str | None:
    """Load the library made of all `*.cpp` in `folder`, compiled first where that has not been done.

    Returns why it cannot be used, in words; None when it is loaded and its operators are in `torch.ops`.
    """
    flags = FLAGS if flags is None else flags
    sources = _sources(folder)
    compiler = find_compiler()
    if compiler is None:
        return _NO_COMPILER
    try:
        home = _home(name, sources, flags, compiler)
        library, failure = home / f"{name}.so", home / "failure.txt"
        home.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            with exclusive_lock(home / ".lock", patience=_PATIENCE):
                if failure.exists():
                    return f"they do not compile here; {failure} says why (delete it to try again)"
                if not library.exists():
                    _compile(compiler, sources, flags, library, failure)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def find_compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, or c++."""
    return shutil.which(os.environ.get("CXX", "c++"))


def state_of(package: str, name: str) -> str:
    """What `load_from` would meet, in words; nothing is compiled or loaded."""
    spec, compiler = find_spec(package), find_compiler()
    if switched_off():
        return "switched off by FINEMOE_NATIVE=0"
    if compiler is None or spec is None or spec.origin is None:
        return _NO_COMPILER
    try:
        home = _home(name, _sources(Path(spec.origin).parent), FLAGS, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} cannot be run: {error}"
    if (home / f"{name}.so").exists():
        return "built"
    failure = home / "failure.txt"
    return f"do not compile: {failure} says why" if failure.exists() else "not built yet: the first run does it"


def _sources(folder: Path) -> list[Path]:
    return sorted((*folder.glob("*.cpp"), *folder.glob("*.h")))


def _home(name: str, sources: Sequence[Path], flags: Sequence[str], compiler: str) -> Path:
    return cache_folder() / "extensions" / f"{name}-{_fingerprint(sources, flags, compiler)}"


def _fingerprint(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> str:
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    parts = [torch.__version__, sys.version, platform.machine(), compiler, about, *flags, instruction_sets()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def instruction_sets() -> str:
    """What `-march=native` depends on: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], library: Path, failure: Path) -> None:
    """All sources at once, each by its own compiler; into a folder of its own first, and in place by one rename.

    The compiler is called here and not by `torch.utils.cpp_extension.load`, which needs ninja on the PATH and waits for
    ever at the lock of a build that was killed; what it knows of torch's headers and libraries is used.

    Raises:
        RuntimeError: the compiler refuses; what it said is in `failure`.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    logger.info("compiling the CPU kernels, once for this machine (about ten seconds) ...")
    started = time.perf_counter()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [compiler, *flags, abi, "-fPIC", *(f"-isystem{path}" for path in include_paths())]
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        objects = {path: f"{work}/{path.stem}.o" for path in sources if path.suffix == ".cpp"}
        linked = Path(work) / library.name
        link = [compiler, "-shared", "-fopenmp", *objects.values(), "-o", str(linked)]
        link += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        said = _run_together([[*common, "-c", str(source), "-o", out] for source, out in objects.items()])
        said = said or _run_together([link])
        if said:
            failure.write_text(said, encoding="utf-8")
            raise RuntimeError(f"they do not compile here; {failure} says why (delete it to try again)")
        linked.replace(library)
    logger.info("compiled in %.0f s", time.perf_counter() - started)


def _run_together(commands: Sequence[Sequence[str]]) -> str:
    """What those that failed said; empty when all went well."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    outputs = [process.communicate()[0] for process in running]
    failed = [index for index, process in enumerate(running) if process.returncode]
    return "\n".join(f"{' '.join(commands[index])}\n{outputs[index]}" for index in failed)
