"""`make mutants`: break one line at a time and see the tests notice.

Reads mutants.toml, puts each mutant into a copy of `src` in a temporary folder (your tree is never touched), runs the
few tests that ought to fail, and says which did. Exit status: 0 all died; 1 one survived; 2 the list itself is out of
date, or the tests fail without any mutant.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/finemoe")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", re.MULTILINE)
_ONE_SUFFIX = re.compile(r"\[.*")


class ListError(Exception):
    """The list does not fit the code, or the tests."""


@dataclass(frozen=True)
class Mutant:
    """One line, wrong."""

    name: str
    file: str
    """Below src/finemoe."""
    was: str
    """A line of it, without its indentation; it occurs exactly once."""
    now: str
    """What stands there instead."""
    tests: tuple[str, ...]
    """Names of files below tests/, or `file::test`: the fewest that ought to notice."""
    why: str

    def source(self, root: Path) -> str:
        """The file with the mutant in it.

        Raises:
            ListError: the line is not there exactly once, or the result is no Python.
        """
        path = root / PACKAGE / self.file
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        places = [number for number, line in enumerate(lines) if line.strip() == self.was]
        if len(places) != 1:
            raise ListError(f"{self.name}: its line is {len(places)} times in {self.file}, not once: {self.was}")
        line = lines[places[0]]
        lines[places[0]] = line[: len(line) - len(line.lstrip())] + self.now
        text = "\n".join(lines) + "\n"
        try:
            compile(text, self.file, "exec")
        except SyntaxError as error:
            raise ListError(f"{self.name}: with the mutant in it {self.file} is no Python: {error}") from error
        return text


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    name: str
    killed: bool
    by: str
    """The test that failed, or `deadline`."""
    seconds: float


def read_list(path: Path) -> list[Mutant]:
    """The mutants of a list.

    Raises:
        ListError: a name occurs twice.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ListError(f"names that occur twice: {', '.join(twice)}")
    return mutants


def check(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """What is out of date in the list, in sentences; [] when nothing is."""
    wrong = []
    for mutant in mutants:
        try:
            mutant.source(root)
        except ListError as error:
            wrong.append(str(error))
        wrong += [f"{mutant.name}: there is no test {test}" for test in mutant.tests if not place_of(test, root)]
    return wrong


def place_of(test: str, root: Path = ROOT) -> str | None:
    """`test_x.py::test_y` with its folder, as pytest wants it; None where there is none. Names of files are unique."""
    file, _, name = test.partition("::")
    for path in (root / "tests").glob(f"*/**/{file}"):
        if not name or f"def {name}(" in path.read_text(encoding="utf-8"):
            return test.replace(file, path.relative_to(root).as_posix(), 1)
    return None


class Copies:
    """A copy of `src` for each worker, lent to one test run at a time."""

    def __init__(self, home: Path, count: int) -> None:
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(count):
            copy = home / str(number)
            shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
            self._free.put(copy)

    def run(self, mutant: Mutant | None, tests: Sequence[str], deadline: float) -> tuple[int | None, str]:
        """Exit status (None: past the deadline) and output of `tests`, with `mutant` in the code."""
        copy = self._free.get()
        try:
            if mutant is None:
                return _pytest(copy, tests, deadline)
            path = copy / PACKAGE / mutant.file
            original = path.read_bytes()
            _replace(path, mutant.source(copy).encode())
            try:
                return _pytest(copy, tests, deadline)
            finally:
                _replace(path, original)
        finally:
            self._free.put(copy)


def _replace(path: Path, data: bytes) -> None:
    """Write a module, and forget what Python compiled of it: two versions may share their second and their size."""
    path.write_bytes(data)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()


def _pytest(copy: Path, tests: Sequence[str], deadline: float) -> tuple[int | None, str]:
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(str(place_of(test)) for test in tests)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(copy / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with _running_lock:
        _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=deadline)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    finally:
        with _running_lock:
            _running.discard(process.pid)


_running: set[int] = set()
_running_lock = threading.Lock()


def try_mutant(mutant: Mutant, copies: Copies, deadline: float) -> Outcome:
    """Whether a mutant's tests notice it.

    Raises:
        ListError: pytest could not run them.
    """
    started = time.monotonic()
    status, output = copies.run(mutant, mutant.tests, deadline)
    seconds = time.monotonic() - started
    if status is None:
        return Outcome(mutant.name, True, "deadline", seconds)
    if status not in (0, 1, 2):  # 2: the tests cannot even be imported any more
        raise ListError(f"{mutant.name}: pytest ended with {status}: {output[-600:]}")
    found = _FAILED.search(output)
    by = _ONE_SUFFIX.sub("", found[1]) if found else "" if status == 0 else "import"
    return Outcome(mutant.name, status != 0, by, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the list."""
    options = _options(arguments)
    try:
        mutants = read_list(Path(options.list))
        wrong = check(mutants)
        if options.only:
            mutants = [one for one in mutants if any(part in one.name for part in options.only)]
        if wrong or not mutants:
            raise ListError("\n".join(wrong) or f"no mutant's name holds {' or '.join(options.only)}")
        if options.check:
            print(f"{len(mutants)} mutants, each at its line")
            return 0
        with tempfile.TemporaryDirectory(prefix="mutants-") as home:
            outcomes = _run(mutants, Copies(Path(home), options.jobs), options)
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    survivors = _summarise(outcomes, {mutant.name: mutant for mutant in mutants})
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n", encoding="utf-8")
    return 1 if survivors else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="those whose name holds NAME; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests that run at once (default: cores)")
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds for one mutant (default: 180)")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there")
    parser.add_argument("--check", action="store_true", help="only see whether every line and test is still there")
    parser.add_argument("--list", default=str(Path(__file__).with_name("mutants.toml")), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run(mutants: Sequence[Mutant], copies: Copies, options: argparse.Namespace) -> list[Outcome]:
    """All of them, and first of all the same tests without any mutant: a test that fails anyhow kills everything."""
    started = time.monotonic()
    outcomes: list[Outcome] = []
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    pool = ThreadPoolExecutor(options.jobs)
    try:
        sound = pool.submit(copies.run, None, tests, max(10 * options.deadline, 600.0))
        pending = {pool.submit(try_mutant, mutant, copies, options.deadline): mutant for mutant in mutants}
        for done in as_completed(pending):
            outcomes.append(done.result())
            _progress(outcomes[-1], len(outcomes), len(mutants), started)
        status, output = sound.result()
        if status != 0:
            raise ListError(f"the tests fail without any mutant:\n{output[-1500:]}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        with _running_lock:  # after an error, or Ctrl-C
            for pid in _running:
                os.killpg(pid, signal.SIGKILL)
        pool.shutdown()
    order = [mutant.name for mutant in mutants]
    return sorted(outcomes, key=lambda one: order.index(one.name))


def _progress(outcome: Outcome, done: int, count: int, started: float) -> None:
    left = (time.monotonic() - started) / done * (count - done)
    word = "killed" if outcome.killed else "SURVIVED"
    print(
        f"{done:3}/{count} {word:8} {outcome.name:34.34} {outcome.seconds:5.1f} s, {left / 60:4.1f} min left",
        flush=True,
    )


def _summarise(outcomes: Sequence[Outcome], mutants: dict[str, Mutant]) -> list[str]:
    """Print the table; the names of survivors."""
    print(f"\n{'mutant':35} killed by")
    for one in outcomes:
        print(f"{one.name:35.35} {(one.by if one.killed else '- SURVIVED'):44.44}")
    survivors = [one.name for one in outcomes if not one.killed]
    spent = sum(one.seconds for one in outcomes)
    print(f"\n{len(outcomes) - len(survivors)} of {len(outcomes)} killed, in {spent / 60:.1f} minutes of testing")
    for name in survivors:
        mutant = mutants[name]
        print(f"\nSURVIVED: {name} ({mutant.why})\n  {mutant.file}\n  - {mutant.was}\n  + {mutant.now}")
        print(f"  tried: {', '.join(mutant.tests)}")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
