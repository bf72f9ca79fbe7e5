"""The gpu tests, then finemoe beside transformers on a CUDA device, in under nine minutes: python -m benchmarks.gpu

Uses the interpreter it is started with, and installs nothing. Every part runs in a process of its own that is stopped
when its time is over; what is missing or failed is said, and the rest goes on. Writes benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.needs import NEEDS, importable, missing, sentence

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SECONDS = {"tests": 90.0, "layer": 90.0, "step": 150.0, "compile": 180.0}
"""The most that each part may take; together under nine minutes."""
_CARD = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
Finished = tuple[int | None, str, str]
"""Exit status, None where it was stopped; standard output; standard error."""
Run = Callable[[Sequence[str], float], Finished]


def limited(command: Sequence[str], seconds: float) -> Finished:
    """Run to its end, or stop it and everything that it has started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            out, said = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, out, said
    return process.returncode, out, said


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=list(NEEDS), metavar="PART", help=", ".join(NEEDS))
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="repetitions, at least (default: 7)")
    parser.add_argument("--quick", action="store_true", help="tiny models, 2 repetitions: to see that it works")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with --quick, to try it without"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where to write (default: {RESULTS.name}, if whole)")
    found = parser.parse_args(given)
    if found.repeats < 1:
        parser.error("--repeats must be at least 1")
    if found.device == "cpu" and not found.quick:
        parser.error("--device cpu is for --quick alone: its figures say nothing of a GPU")
    if found.quick:
        found.repeats = min(found.repeats, 2)
    return found


def obstacle(device: str) -> str | None:
    """Why nothing can be measured, in a sentence."""
    if not importable("torch"):
        return f"{sys.executable} has no torch, so nothing was measured; make gpu PYTHON=... names another interpreter."
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return (
            f"There is no CUDA device that torch {torch.__version__} of {sys.executable} can use, "
            f"so nothing was measured and {RESULTS.name} is as it was."
        )
    return None


def card() -> dict[str, str]:
    """Name, driver, clocks, temperature and power of the device at this moment; it is only read."""
    command = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CARD.split(","), (value.strip() for value in done.stdout.split(",")), strict=False))


def gpu_tests() -> list[str]:
    """Files that hold tests marked gpu: the others need not be imported."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [path.relative_to(ROOT).as_posix() for path in marked]


def run_tests(seconds: float, run: Run = limited) -> dict[str, Any]:
    """The gpu tests' last line, and whether all passed.

    Warnings are no errors here: versions of torch and of what surrounds it are whatever the machine has.
    """
    options = ["-q", "-m", "gpu", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    status, out, said = run([sys.executable, "-m", "pytest", *options, *gpu_tests()], seconds)
    if status is None:
        return {"passed": False, "said": f"stopped after {seconds:.0f} s"}
    if status:
        print(out, said, sep="\n", file=sys.stderr)
    lines = out.strip().splitlines() or said.strip().splitlines() or ["nothing"]
    return {"passed": status == 0, "said": lines[-1]}


def run_part(
    name: str, wanted: argparse.Namespace, seconds: float, run: Run = limited
) -> tuple[dict[str, Any] | None, str | None]:
    """What the part found, as far as it came, and why it came no further."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu.parts", name, "--out", str(out)]
        command += ["--device", wanted.device, "--repeats", str(wanted.repeats), *(["--quick"] if wanted.quick else [])]
        status, _, said = run(command, seconds)
        found: dict[str, Any] | None = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
        if status is None:
            return found, f"stopped after {seconds:.0f} s"
        if status or found is None:
            print(said, file=sys.stderr)
            return found, (said.strip().splitlines() or [f"ended with {status}"])[-1]
        return found, None


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Every part that can run here, and what became of the others."""
    names = [name for name in NEEDS if wanted.only is None or name in wanted.only]
    if wanted.device == "cpu":  # those tests are for a GPU
        names = [name for name in names if name != "tests"]
    results: dict[str, Any] = {"tests": None, "parts": {}, "left_out": {}, "failed": {}, "cards": {}}
    for name in names:
        lacking = missing(name)
        if lacking:
            results["left_out"][name] = sentence(name, lacking)
            print(results["left_out"][name], file=sys.stderr)
            continue
        print(f"{name}, at most {SECONDS[name]:.0f} s ...", file=sys.stderr)
        before = card()
        if name == "tests":
            results["tests"] = run_tests(SECONDS[name])
            if not results["tests"]["passed"]:
                results["failed"][name] = results["tests"]["said"]
        else:
            found, problem = run_part(name, wanted, SECONDS[name])
            if found is not None:
                results["parts"][name] = found
            if problem is not None:
                results["failed"][name] = problem
                print(f"{name} failed: {problem}", file=sys.stderr)
        results["cards"][name] = {"before": before, "after": card()}
    return results


def show_results(results: Mapping[str, Any], title: str) -> None:
    """A table of all rows; without rich there are none."""
    if results["tests"] is not None:
        print(f"gpu tests: {results['tests']['said']}")
    for name, text in results["failed"].items():
        print(f"{name} failed: {text}")
    parts = results["parts"]
    if not parts:
        return
    from benchmarks.speed.table import Measured, Row, show
    from benchmarks.speed.timing import Spread

    def side(found: dict[str, Any] | None) -> Any:
        return None if found is None else Measured(**found)

    found = [row for part in parts.values() for row in part["rows"]]
    rows = [Row(**{**row, "ours": side(row["ours"]), "peer": side(row["peer"])}) for row in found]
    peaks = {
        name: Spread.of([x for part in parts.values() for x in part["peaks"][name]]) for name in ("gemm", "bandwidth")
    }
    notes = [note for part in parts.values() for note in part["notes"]]
    memory = {name: size for part in parts.values() for name, size in part["memory"].items() if size}
    notes += [f"{name}: {size / 2**30:.2f} GiB at most in a training step" for name, size in memory.items()]
    show(rows, [], peaks, notes, title)


def about(wanted: argparse.Namespace, given: Sequence[str], seconds: float) -> dict[str, Any]:
    """Versions, device, command and date."""
    import torch

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    device: dict[str, Any] = {"kind": wanted.device}
    if wanted.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device |= {"name": properties.name, "bytes": properties.total_memory, "sms": properties.multi_processor_count}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *given]),
        "quick": wanted.quick,
        "repeats": wanted.repeats,
        "seconds": round(seconds, 1),
        "versions": versions,
        "device": device,
        "revision": _revision(),
    }


def _revision() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except OSError:
        return None
    return done.stdout.strip() or None


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a part failed or was left out, 2 where nothing can be measured."""
    given = sys.argv[1:] if given is None else given
    wanted = arguments(given)
    reason = obstacle(wanted.device)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    started = time.perf_counter()
    results = measure(wanted)
    results = {**about(wanted, given, time.perf_counter() - started), **results}
    title = f"finemoe on {results['device'].get('name', wanted.device)}, bf16, {wanted.repeats} repetitions or more"
    show_results(results, title + (" (quick: these are no results)" if wanted.quick else ""))
    whole = wanted.device == "cuda" and not wanted.quick and wanted.only is None and bool(results["parts"])
    place = wanted.out or (RESULTS if whole else None)
    if place is None:
        print("Not written: this was not a whole run on a GPU; --out FILE writes it.", file=sys.stderr)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(place)
    return 1 if results["failed"] or results["left_out"] else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    os.environ.setdefault("FINEMOE_NATIVE", "0")  # C++ is for float32 on a CPU: compiling it would take its time here
    raise SystemExit(main())
