"""Run generated Python apart from everything else, with a verdict of its own for every way to end.

Each program gets a new interpreter with the standard library alone, an empty environment and a fresh folder, and
meets these layers, where the system has them (`layers()` says which are active here, and results should state it):

- limits of memory, processor time, size and number of files, output; a wall-clock deadline; the kill of all
- Linux namespaces: a process tree that ends as a whole, no network, every file system read-only but the folder, which
  lies in memory; orphans are adopted and killed; a root of its own, in which the host's files are not
- Landlock: reading Python's library and the folder, writing the folder; seccomp: no socket, process, signal to others
- an audit hook in Python, which names violations and ends the program at the first

macOS has the limits (memory excepted), the audit hook and the kill of the process group: a program that means harm
gets past them. Nowhere is this a boundary against a determined attacker: a flaw in the kernel opens it, and a program
written for the purpose can find the runner inside its own process and forge the end. It holds what a language model
writes by accident, and the usual tricks. A container without network around it costs little.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finemoe.core.errors import ConfigError

Verdict = Literal["passed", "failed", "timeout", "crash", "violation", "error"]
"""passed: reached its end. failed: an exception, or it left early. timeout: wall clock or processor time. crash: a
signal, no memory, over a limit. violation: tried what is forbidden. error: the sandbox itself failed, so that nothing
is known of the program."""

_CHILD = Path(__file__).with_name("child.py")
_GRACE = 25.0  # seconds beyond the program's own, in which the supervisor must have answered


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    """Rounded up to whole seconds by the system."""
    memory_bytes: int = 1 << 30
    """Address space of each process."""
    processes: int = 0
    """How many it may start beside its own. With any, a bomb is counted and ended rather than prevented."""
    output_bytes: int = 1 << 18
    """stdout and stderr together."""
    file_bytes: int = 16 << 20
    """Of each file; where there is a mount namespace, of all together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "processes"):
                raise ConfigError(f"the sandbox's limit {name} is {value}; it must be a number above zero")
        if self.memory_bytes < 64 << 20:
            raise ConfigError(f"the sandbox's memory_bytes is {self.memory_bytes}; Python itself needs {64 << 20}")


@dataclass(frozen=True)
class Execution:
    """How one program ended."""

    verdict: Verdict
    exit_code: int | None
    """Negative: ended by that signal. None: ended from outside."""
    seconds: float
    """Wall clock, without the start of the interpreter."""
    output: str
    """stdout and stderr as they came, at most `output_bytes`."""
    note: str
    """Why, in a line; empty where it passed."""


def supported() -> str | None:
    """Why no program can be run on this system; None where it can."""
    if os.name != "posix":
        return "the sandbox needs a POSIX system (Linux, macOS): run it there, or in WSL or a container"
    if not sys.executable:
        return "Python does not know its own interpreter (sys.executable is empty)"
    answer = _ask("", Limits(), "")
    if answer["verdict"] == "passed":
        return None
    if answer["verdict"] == "refused":
        return str(answer["note"])
    return f"an empty program does not pass here: {answer['verdict']}, {answer['note']}"


def layers() -> dict[str, str]:
    """Layer -> "active ...", or "missing: why", as an empty program met them here."""
    return dict(_ask("", Limits(), "", weak=True).get("layers", {}))


def execute(program: str, limits: Limits = Limits(), stdin: str = "", weak: bool = False) -> Execution:
    """Run `program` as a script to its end or to a limit. Nothing that it started or wrote is left.

    Args:
        weak: go on where Linux gives neither namespaces nor seccomp, so that the audit hook alone is between the
            program and the network.

    Raises:
        ConfigError: this is no system on which programs can be ended and limited; or a weak one, not agreed to.
    """
    if os.name != "posix":
        raise ConfigError(supported() or "")
    answer = _ask(program, limits, stdin, weak=weak)
    if answer["verdict"] == "refused":
        raise ConfigError(answer["note"])
    return Execution(**{name: answer[name] for name in ("verdict", "exit_code", "seconds", "output", "note")})


@contextmanager
def _folder() -> Iterator[str]:
    """A new folder, which goes away whatever modes the program gave to what lies in it."""
    path = os.path.realpath(tempfile.mkdtemp(prefix="finemoe-sandbox-"))
    try:
        yield path
    finally:
        if os.listdir(path):
            for place, names, _ in os.walk(path):
                for name in (place, *(os.path.join(place, name) for name in names)):
                    if not os.path.islink(name):
                        with suppress(OSError):
                            os.chmod(name, stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)


def _ask(program: str, limits: Limits, stdin: str, without: Sequence[str] = (), weak: bool = False) -> dict[str, Any]:
    """The supervisor's answer. `without` leaves layers out: each must hold alone, and the tests see that it does."""
    complaint = b""
    with _folder() as folder:
        request = {
            "program": program,
            "stdin": stdin,
            "folder": folder,
            "parent": os.getpid(),
            "limits": asdict(limits),
            "without": list(without),
            "weak": weak,
        }
        interpreter = os.path.realpath(sys.executable)
        process = subprocess.Popen(
            [interpreter, "-sSP", "-X", "utf8", str(_CHILD), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},  # a set prints alike in every run
            start_new_session=True,
        )
        try:
            answer, complaint = process.communicate(json.dumps(request).encode(), timeout=limits.wall_seconds + _GRACE)
            return dict(json.loads(answer))
        except subprocess.TimeoutExpired:
            note = f"the supervisor gave no answer in {limits.wall_seconds + _GRACE:g} seconds"
        except (ValueError, OSError):
            last = complaint.decode("utf-8", "replace").strip().splitlines() if process.returncode else []
            note = f"the supervisor ended with status {process.returncode}: {last[-1] if last else 'no message'}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return {"verdict": "error", "exit_code": None, "seconds": 0.0, "output": "", "note": note, "layers": {}}
