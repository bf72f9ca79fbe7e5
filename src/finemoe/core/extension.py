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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from finemoe.core.environment import cache_folder, processor
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import logger

FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_FUSED = "--param=avoid-fma-max-bits=0"
"""For GCC, which on Zen 2 and 3 makes some sums of products without FMA, and the same sums elsewhere with it: a row
would depend on its neighbours."""
_PATIENCE = 300.0  # seconds to wait for another process that compiles
_COMPILERS = ("c++", "g++", "clang++")
_PASSING = ("No space left on device", "Disk quota exceeded", "Cannot allocate memory", "out of memory", "Killed")
"""What a compiler says of a machine that was full or busy, not of the sources: next time it may be well."""

_ROUNDS = 7
_CLEARLY = 0.9  # of the first variant's time: less of a gain is noise, or not worth a word

Timer = Callable[[Sequence[Path]], Sequence[float]]
"""Seconds of each of several programs."""


@dataclass(frozen=True)
class Probe:
    """A program that prints how many seconds it took, to be compiled with several sets of flags."""

    source: str
    """Its path, from the folder of the library's own."""
    variants: tuple[tuple[str, ...], ...]
    """The first is what the sources have without any."""


def switched_off() -> bool:
    """Whether the environment says FINEMOE_NATIVE=0."""
    return os.environ.get("FINEMOE_NATIVE") == "0"


def load_from(package: str, name: str, probe: Probe | None = None) -> str | None:
    """`load` the C++ files that lie in a Python package, under `name`."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return f"there is no package {package}"
    return load(name, Path(spec.origin).parent, probe=probe)


def load(name: str, folder: Path, flags: Sequence[str] | None = None, probe: Probe | None = None) -> str | None:
    """Load the library made of all `*.cpp` in `folder`, compiled first where that has not been done.

    Args:
        name: of the library.
        folder: of the sources.
        flags: of the compiler. None: FLAGS.
        probe: run once, before the library is compiled, which gets the flags of the fastest; they are kept beside it.

    Returns why it cannot be used, in words; None when it is loaded and its operators are in `torch.ops`.
    """
    sources = _sources(folder)
    compiler = find_compiler()
    if compiler is None:
        return _no_compiler()
    try:
        flags = _flags(FLAGS if flags is None else flags, compiler)
        library = _home(name, sources, flags, compiler) / f"{name}.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        tune = partial(_more_flags, compiler, flags, probe, folder)
        if not library.exists():
            _build(compiler, sources, flags, library, tune)
        found = library.stat()
        try:
            torch.ops.load_library(library)
        except OSError:  # cut short, say, when the machine lost its power
            _build(compiler, sources, flags, library, tune, unlike=found)
            _load_or_give_up(library)
    except (OSError, RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
        said = str(error.__cause__ or error).strip()  # torch names the file, and its cause what is wrong with it
        return said.splitlines()[0] if said else type(error).__name__
    return None


def _load_or_give_up(library: Path) -> None:
    """Load a library that was just built. Where that is not possible either, no other process builds it again."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        said = str(error.__cause__ or error)
        if not any(reason in said for reason in _PASSING):
            _failure(library).write_text(f"{said}\n", encoding="utf-8", errors="replace")
        library.unlink(missing_ok=True)
        raise


def _failure(library: Path) -> Path:
    return library.with_name("failure.txt")


def _tuned(library: Path) -> Path:
    return library.with_name("tuned.txt")


def find_compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, or the first there is of the usual names."""
    names = [asked] if (asked := os.environ.get("CXX")) else _COMPILERS
    return next((path for path in map(shutil.which, names) if path is not None), None)


def _no_compiler() -> str:
    asked = os.environ.get("CXX")
    if asked:
        return f"CXX is {asked!r}, which is no program here: unset it, or name a C++ compiler without any options"
    return "no C++ compiler was found (install g++ or clang)"


def state_of(package: str, name: str) -> str:
    """What `load_from` would meet, in words; nothing is compiled or loaded."""
    spec, compiler = find_spec(package), find_compiler()
    if switched_off():
        return "switched off by FINEMOE_NATIVE=0"
    if compiler is None:
        return _no_compiler()
    if spec is None or spec.origin is None:
        return f"there is no package {package}"
    try:
        flags = _flags(FLAGS, compiler)
        library = _home(name, _sources(Path(spec.origin).parent), flags, compiler) / f"{name}.so"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} cannot be run: {error}"
    if library.exists():
        found = _tuned(library).read_text(encoding="utf-8").strip() if _tuned(library).exists() else ""
        return f"built, by measuring with {found}" if found else "built"
    failure = _failure(library)
    return f"cannot be built: {failure} says why" if failure.exists() else "not built yet: the first run does it"


def _sources(folder: Path) -> list[Path]:
    return sorted((*folder.glob("*.cpp"), *folder.glob("*.h")))


def _home(name: str, sources: Sequence[Path], flags: Sequence[str], compiler: str) -> Path:
    return cache_folder() / "extensions" / f"{name}-{_fingerprint(sources, flags, compiler)}"


def _flags(flags: Sequence[str], compiler: str) -> tuple[str, ...]:
    gnu = "Free Software Foundation" in _about(compiler)
    return (*flags, _FUSED) if gnu else tuple(flags)


def _about(compiler: str) -> str:
    asked = [compiler, "--version"]
    return subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=30, check=True).stdout


def _fingerprint(sources: Sequence[Path], flags: Sequence[str], compiler: str) -> str:
    about = _about(compiler)
    machine = [platform.machine(), processor(), instruction_sets()]
    parts = [torch.__version__, sys.version, *machine, compiler, about, *flags]
    digest = hashlib.sha256("\n".join(parts).encode(errors="surrogateescape"))
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


def _build(
    compiler: str,
    sources: Sequence[Path],
    flags: Sequence[str],
    library: Path,
    tune: Callable[[], tuple[str, ...]],
    unlike: os.stat_result | None = None,
) -> None:
    """Compile by one process at a time, unless another has done it meanwhile, or it is known to fail.

    Args:
        unlike: a library that is there and cannot be loaded.

    Raises:
        RuntimeError: the sources do not compile.
    """
    failure = _failure(library)
    with exclusive_lock(library.with_name(".lock"), patience=_PATIENCE, on_wait=_say_waiting):
        if failure.exists():
            raise RuntimeError(_given_up(failure))
        if not library.exists() or (unlike is not None and os.path.samestat(library.stat(), unlike)):
            logger.info("compiling the CPU kernels, once for this machine (about a minute on two cores) ...")
            more = tune()
            _tuned(library).unlink(missing_ok=True)
            if more:  # before the library: what ends this process between the two leaves no library without its flags
                _tuned(library).write_text(" ".join(more), encoding="utf-8")
            _compile(compiler, sources, (*flags, *more), library)


def _say_waiting() -> None:
    logger.info("another process compiles the CPU kernels; waiting for it ...")


def _given_up(failure: Path) -> str:
    return f"they cannot be built here; {failure} says why (delete it to try again)"


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], library: Path) -> None:
    """Each source by a compiler of its own; into a folder beside the library first, and in place by one rename.

    The compiler is called here and not by `torch.utils.cpp_extension.load`, which needs ninja on the PATH and waits for
    ever at the lock of a build that was killed; what it knows of torch's headers and libraries is used.

    Raises:
        RuntimeError: the compiler refuses; what it said is kept, where it speaks of the sources.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    started = time.perf_counter()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [compiler, *flags, abi, "-fPIC", *(f"-isystem{path}" for path in include_paths())]
    for left in library.parent.glob("work-*"):  # by a process that was killed; its compilers may still be at work there
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="work-", ignore_cleanup_errors=True) as work:
        objects = {path: f"{work}/{path.stem}.o" for path in sources if path.suffix == ".cpp"}
        linked = Path(work) / library.name
        link = [compiler, "-shared", "-fopenmp", *objects.values(), "-o", str(linked)]
        link += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lc10"]
        said = _run_together([[*common, "-c", str(source), "-o", out] for source, out in objects.items()])
        said = said or _run_together([link])
        if reason := next((reason for reason in _PASSING if reason in said), None):
            raise RuntimeError(f"the compiler was stopped: {reason}; the next run tries again")
        if said:
            _failure(library).write_text(said, encoding="utf-8", errors="replace")
            raise RuntimeError(_given_up(_failure(library)))
        linked.replace(library)
    logger.info("compiled in %.0f s", time.perf_counter() - started)


def _run_together(commands: Sequence[Sequence[str]]) -> str:
    """What those that failed said; empty when all went well. As many at once as there are cores: each takes 0.6 GB."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return "\n".join(said for said in pool.map(_said, commands) if said)


def _more_flags(compiler: str, flags: Sequence[str], probe: Probe | None, folder: Path) -> tuple[str, ...]:
    return () if probe is None else fastest(compiler, flags, probe, folder)


def fastest(
    compiler: str, flags: Sequence[str], probe: Probe, folder: Path, timer: Timer | None = None
) -> tuple[str, ...]:
    """Flags of a probe's fastest variant, beside `flags`; none where those begin with a variant's own, where none is
    clearly faster than the first, or where it cannot be measured.

    Args:
        compiler: path of a C++ compiler.
        flags: with which the library is compiled.
        probe: what is measured.
        folder: of the library's sources.
        timer: measures; tests give their own.
    """
    named = {one.partition("=")[0] for variant in probe.variants for one in variant}
    if any(flag.partition("=")[0] in named for flag in flags):
        return ()
    try:
        with tempfile.TemporaryDirectory(prefix="finemoe-probe-", ignore_cleanup_errors=True) as work:
            programs = [Path(work) / f"probe-{number}" for number in range(len(probe.variants))]
            said = _run_together([
                [compiler, *flags, *variant, str(folder / probe.source), "-o", str(program)]
                for variant, program in zip(probe.variants, programs, strict=True)
            ])  # fmt: skip
            if said:
                raise RuntimeError(said)
            seconds = (timer or in_turns)(programs)
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        logger.debug("%s was not measured: %s", probe.source, error)
        return ()
    best = min(range(len(seconds)), key=lambda number: seconds[number])
    for variant, one in zip(probe.variants, seconds, strict=True):
        logger.debug("%s: %.4g ms", " ".join(variant), one * 1e3)
    if not seconds[best] <= _CLEARLY * seconds[0]:
        return ()
    chosen = probe.variants[best]
    logger.info("with %s it takes %.2f of the usual time here", " ".join(chosen), seconds[best] / seconds[0])
    return chosen


def in_turns(programs: Sequence[Path]) -> list[float]:
    """The least that each says of itself, run in turns, so that a busy moment meets all of them.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: one does not run, or says no number.
    """
    best = [float("inf")] * len(programs)
    for _ in range(_ROUNDS):
        for number, program in enumerate(programs):
            done = subprocess.run([program], stdout=subprocess.PIPE, check=True, timeout=_PATIENCE)
            best[number] = min(best[number], float(done.stdout))
    return best


def _said(command: Sequence[str]) -> str:
    """What a command said that failed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},  # in the words of _PASSING
        check=False,
    )
    stopped = "Killed\n" if done.returncode < 0 else ""  # by a signal
    return f"{' '.join(command)}\n{stopped}{done.stdout}" if done.returncode else ""
