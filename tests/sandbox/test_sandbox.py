"""The sandbox against programs that fail or run wild: each gets its verdict in time, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finemoe.core.errors import ConfigError
from finemoe.sandbox import sandbox
from finemoe.sandbox.sandbox import Limits, execute
from sandbox.hostile import LINUX, ROOMY, SHORT, SLACK, SUPPORTED, need, run, started_in

pytestmark = SUPPORTED

ORDINARY = {
    "nothing": "",
    "print": "print('hello')",
    "file": "open('a.txt', 'w').write('x'); assert open('a.txt').read() == 'x'; import os; os.remove('a.txt')",
    "temporary": "import tempfile\nwith tempfile.TemporaryDirectory() as folder: open(folder + '/x', 'w').close()",
    "threads": "import threading\nt = threading.Thread(target=print, args=('hello',)); t.start()",
    "pool": "from concurrent.futures import ThreadPoolExecutor as P\nwith P(4) as p: print(sum(p.map(abs, range(9))))",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())",
    "library": "import decimal, fractions, hashlib, json, random, re, sqlite3, statistics, unittest, uuid, zoneinfo\n"
    "uuid.uuid4(); sqlite3.connect(':memory:').execute('select 1'); hashlib.sha256(b'')",
    "main": "import sys\nif __name__ == '__main__': assert sys.modules['__main__'].__dict__ is globals()",
    "caught": "try:\n    1 / 0\nexcept ZeroDivisionError: pass",
    "dataclass": "from __future__ import annotations\n"
    "from dataclasses import dataclass\n@dataclass\nclass A: x: int\nA(1)",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, print); signal.alarm(5); signal.alarm(0)",
    "stack": "import traceback, inspect, warnings\ntraceback.print_stack(); inspect.stack(); warnings.warn('x')",
    "signal to itself": "import os, signal\nsignal.signal(signal.SIGUSR1, print); os.kill(os.getpid(), signal.SIGUSR1)",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_pass(name: str) -> None:
    done = run(ORDINARY[name])
    assert (done.verdict, done.exit_code, done.note) == ("passed", 0, ""), done


def test_input_and_output_go_through() -> None:
    done = run(
        "import sys\nprint(input()[::-1]); print(sys.stdin.read(), flush=True); sys.stderr.write('é\\n')",
        stdin="abc\n" * 9,
    )
    assert done.verdict == "passed"
    assert done.output == "cba\n" + "abc\n" * 8 + "\né\n"


@pytest.mark.parametrize("program", ["\ud800", "x = '\ud800'\nassert 0", "\0", "(" * 5000, "1" * 10_000])
def test_text_that_is_hardly_a_program_is_judged(program: str) -> None:
    assert run(program, stdin="\udfff").verdict in ("failed", "crash")


def test_two_runs_print_alike() -> None:
    program = "print({'alpha', 'beta', 'gamma', 'delta'}, hash('x'))"
    assert run(program).output == run(program).output


FAILING = {
    "assertion": ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
    "exception": ("def f():\n    raise ValueError('first\\nsecond')\nf()", "ValueError: first"),
    "syntax": ("def f(:", "SyntaxError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "own exception": ("class E(Exception):\n    def __str__(self): raise E\nraise E", "E"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize("name", FAILING)
def test_failures_say_why(name: str) -> None:
    program, note = FAILING[name]
    done = run(program)
    assert done.verdict == "failed"
    assert note in done.note
    assert "/sandbox/" not in done.output  # the program's own lines, not ours


OURS = sorted(path.stem for path in Path(sandbox.__file__).parent.glob("[!_]*.py"))


def test_our_modules_cannot_be_imported_by_a_program() -> None:
    """The folder of the sandbox was on the path when its parts were loaded: nothing of that is left."""
    assert {"harness", "kernel"} <= set(OURS)
    program = (
        f"import sys\nfor name in {[*OURS, 'finemoe']}:\n"
        "    assert name not in sys.modules, name\n"
        "    try: __import__(name)\n    except ModuleNotFoundError: pass\n    else: raise AssertionError(name)\n"
    )
    done = run(program)
    assert done.verdict == "passed", done.note


def test_a_program_may_call_its_own_modules_as_ours_are_called() -> None:
    program = (
        f"import os, sys\nsys.path.insert(0, os.getcwd())\nfor name in {OURS}:\n"
        "    with open(name + '.py', 'w') as file: file.write('WHO = \\'mine\\'\\n')\n"
        "    assert __import__(name).WHO == 'mine'\n"
    )
    done = run(program)
    assert done.verdict == "passed", done.note


def test_modules_under_our_names_do_not_change_the_verdict() -> None:
    """The end is judged by what was loaded before the program began."""
    forged = f"import sys, types\nfor name in {OURS}: sys.modules[name] = types.ModuleType(name)\n"
    assert run(forged).verdict == "passed"
    assert run(forged + "assert 1 == 2, 'one is not two'").note == "AssertionError: one is not two"


def test_our_modules_hide_none_of_the_library() -> None:
    """While they load, their folder stands first on the path."""
    assert not set(OURS) & set(sys.stdlib_module_names)


TESTS = "\nassert 1 == 2"
FORGE = "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'%s\\n')\n    except OSError: pass\nos._exit(0)"
EARLY = {
    "sys.exit": "import sys; sys.exit(0)",
    "quit": "raise SystemExit",
    "os._exit": "import os; os._exit(0)",
    "exit in a thread": "import os, threading as t, time\nt.Thread(target=os._exit, args=(0,)).start(); time.sleep(5)",
    "exit at exit": "import atexit, os; atexit.register(os._exit, 0)",
    "builtins": "import builtins, os, sys\nbuiltins.exec = builtins.compile = builtins.open = print\n"
    "os.write = os._exit = sys.exit = lambda *a: 0\nbuiltins.AssertionError = builtins.Exception = SystemExit",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
    "traceback": "import traceback, os\ntraceback.print_exc = traceback.format_exception_only = lambda *a: os._exit(0)",
    "json": 'import json, os\njson.dumps = lambda *a, **k: \'{"passed": ""}\'',
    "guessing": 'import os\nfor fd in range(3, 30):\n    try: os.write(fd, b\'{"passed": ""}\\n{"passed": null}\\n\')\n'
    "    except OSError: pass",
    "blaming us": 'import os\nfor fd in range(3, 30):\n    try: os.write(fd, b\'{"error": "the sandbox broke"}\\n\')\n'
    "    except OSError: pass",
    "guessing and leaving": FORGE % '{"passed": ""}',
    "blaming and leaving": FORGE % '{"error": "the sandbox broke"}',
    "refusing and leaving": FORGE % '{"refused": "no such system"}',
    "noise": FORGE % "[1, {}, null]",
    "closing": "import os\nos.closerange(0, 64)",
    "duplicating": "import os\nfor fd in range(3, 30):\n    try: os.dup2(1, fd)\n    except OSError: pass",
}


@pytest.mark.parametrize("name", EARLY)
def test_no_way_around_the_last_line_passes(name: str) -> None:
    assert run(EARLY[name] + TESTS).verdict == "failed"


@pytest.mark.parametrize("name", [name for name in EARLY if "exit" in name or "leaving" in name])
def test_leaving_early_fails_even_where_nothing_would(name: str) -> None:
    assert run(EARLY[name]).verdict == "failed"


SLOW = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "signals": "import signal, time\nfor n in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "exceptions": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "atexit": "import atexit, time; atexit.register(time.sleep, 60)",
    "message": "import time\nclass E(Exception):\n    def __str__(self): time.sleep(60)\nraise E",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "arithmetic": "9 ** 9 ** 9",
    "input": "import time\nwhile True: time.sleep(0.01)",
}


@pytest.mark.parametrize("name", SLOW)
def test_the_deadline_holds(name: str) -> None:
    limits = replace(SHORT, wall_seconds=0.4)
    begun = time.monotonic()
    done = execute(SLOW[name], limits)
    assert done.verdict == "timeout", done
    assert time.monotonic() - begun < 0.4 + SLACK
    assert 0.3 < done.seconds < 3.0


def test_processor_time_is_its_own_deadline() -> None:
    done = run(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", replace(ROOMY, cpu_seconds=1)
    )
    assert done.verdict == "timeout"
    assert "processor time" in done.note


CRASHES = {
    "memory": ("x = bytearray(1 << 40)", "memory"),
    "memory in steps": ("x = []\nwhile True: x.append(bytearray(1 << 22))", "memory"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "abort": ("import os; os.abort()", "SIGABRT"),
    "output": ("while True: print('x' * 1000)", "output"),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "big file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "files"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_limits_and_signals_are_crashes(name: str) -> None:
    if "memory" in name and sys.platform == "darwin":
        pytest.skip("macOS limits no memory")
    program, note = CRASHES[name]
    done = run(program)
    assert done.verdict == "crash", done
    assert note in done.note
    assert len(done.output) <= ROOMY.output_bytes


@LINUX
def test_a_swarm_of_threads_is_ended() -> None:
    program = "import threading, time\nthreading.stack_size(65536)\n" + (
        "for _ in range(200): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\ntime.sleep(60)"
    )
    done = run(program)
    assert done.verdict == "crash"
    assert "threads" in done.note


def test_many_files_are_bounded_together() -> None:
    need("mounts")
    done = run("for n in range(1000): open(f'{n}', 'wb').write(bytes(1 << 16))")
    assert done.verdict == "crash"
    assert "No space left" in done.note


@pytest.mark.parametrize("limit", ["RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"])
def test_limits_cannot_be_raised(limit: str) -> None:
    if limit == "RLIMIT_AS" and sys.platform == "darwin":
        pytest.skip("macOS limits no memory")
    if os.getuid() == 0:
        need("capabilities")
    program = f"import resource as r\nsoft, hard = r.getrlimit(r.{limit})\nassert hard >= 0\n"
    assert run(program).verdict == "passed"
    done = run(program + f"r.setrlimit(r.{limit}, (hard + 1, hard + 1))")
    assert done.verdict == "failed"
    assert "not allowed to raise" in done.note


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("HOSTILE_SECRET", "token")
    done = run("import os; print(sorted(os.environ), os.getcwd(), os.listdir('.'))")
    assert "HOSTILE" not in done.output
    assert str(place) in done.output
    assert done.output.endswith("[]\n")


def test_the_program_inherits_no_open_file() -> None:
    program = (
        "import os\nfound = []\nfor n in range(64):\n    try: os.fstat(n); found.append(n)\n"
        "    except OSError: pass\nprint(len(found))"
    )
    with tempfile.TemporaryFile(dir="/tmp") as mine:
        os.set_inheritable(mine.fileno(), True)
        assert int(run(program).output) == 5  # stdin, stdout, stderr, and the runner's own two


def test_a_killed_caller_takes_its_programs_along(place: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent ended")
    code = (
        "import tempfile, sys; tempfile.tempdir = sys.argv[1]\nfrom finemoe.sandbox.sandbox import execute, Limits\n"
        "execute('import time; time.sleep(50)', Limits(wall_seconds=60))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code, str(place)])
    until = time.monotonic() + 20
    while len(started_in(place)) < 4 and time.monotonic() < until:  # the caller, the supervisor, and two inside
        time.sleep(0.05)
    assert len(started_in(place)) >= 4
    caller.kill()
    caller.wait()
    until = time.monotonic() + 10
    while started_in(place) and time.monotonic() < until:
        time.sleep(0.05)
    assert started_in(place) == []
    for folder in place.iterdir():
        folder.rmdir()  # nothing could remove it any more; it is empty


def test_a_sandbox_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such thing')")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    done = execute("print(1)", SHORT)
    assert done.verdict == "error"
    assert "no such thing" in done.note
    assert "does not pass here" in (sandbox.supported() or "")


def test_a_supervisor_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "hanging.py"
    broken.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    monkeypatch.setattr(sandbox, "_GRACE", 0.3)
    done = execute("print(1)", replace(SHORT, wall_seconds=0.2))
    assert done.verdict == "error"


@pytest.mark.parametrize(
    "field",
    [{"wall_seconds": 0}, {"memory_bytes": 1}, {"output_bytes": -1}, {"processes": -1}, {"cpu_seconds": float("inf")}],
    ids=str,
)
def test_impossible_limits_are_refused(field: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        Limits(**field)
