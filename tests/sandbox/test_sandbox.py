"""The sandbox against programs that misbehave: each gets its verdict in time, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from finemoe.core.errors import ConfigError
from finemoe.sandbox import sandbox
from finemoe.sandbox.sandbox import Execution, Limits, execute

SHORT = Limits(wall_seconds=1.0, cpu_seconds=1, output_bytes=10_000, file_bytes=1 << 20, memory_bytes=256 << 20)
ROOMY = replace(SHORT, wall_seconds=10.0, cpu_seconds=10)  # where the end comes from elsewhere than the clock
SLACK = 8.0  # seconds for starting and clearing up on a busy machine

WHY = sandbox.supported()
pytestmark = pytest.mark.skipif(WHY is not None, reason=str(WHY))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's layers are Linux's")


@cache
def active() -> dict[str, bool]:
    return {name: state.startswith("active") for name, state in sandbox.layers().items()}


def need(*names: str) -> None:
    missing = [name for name in names if not active().get(name)]
    if missing:
        pytest.skip(f"layers that are missing here: {missing}")


def started_in(folder: Path) -> list[str]:
    """The command lines of living processes that name `folder`: every process of a sandbox does."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sandboxes make their folders; afterwards no file and no process may be left."""
    folder = tmp_path / "sandboxes"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    assert started_in(folder) == []
    assert not list(Path("/dev/shm").glob("hostile-*"))


def run(program: str, limits: Limits = ROOMY, stdin: str = "") -> Execution:
    begun = time.monotonic()
    done = execute(program, limits, stdin)
    assert time.monotonic() - begun < limits.wall_seconds + SLACK
    return done


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


def violations(outside: Path) -> dict[str, str]:
    target = str(outside)
    return {
        "fork": "import os; os.fork()",
        "fork bomb": "import os\nfor _ in range(6):\n    try: os.fork()\n    except OSError: pass",
        "detached": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)",
        "subprocess": "import subprocess; subprocess.run(['true'])",
        "shell": "import os; os.system('true')",
        "exec": "import os; os.execv('/bin/true', ['true'])",
        "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "multiprocessing": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        "passwd": "open('/etc/passwd').read()",
        "passwd, caught": "try: open('/etc/passwd')\nexcept BaseException: pass",
        "list": "import os; os.listdir('/')",
        "write": f"open({target!r}, 'w')",
        "append": f"import pathlib; pathlib.Path({target!r}).open('a')",
        "home": "import os; open('/root/hostile' if os.getuid() == 0 else '/home/hostile', 'w')",
        "parent": "open('../hostile', 'w')",
        "remove": f"import os; os.remove({target!r})",
        "rename": f"import os; open('a', 'w').close(); os.rename('a', {target!r})",
        "mode": f"import os; os.chmod({target!r}, 0o777)",
        "link": f"import os; os.symlink({target!r}, 'link'); open('link', 'w')",
        "linked folder": f"import os; os.symlink({str(outside.parent)!r}, 'd'); open('d/hostile', 'w')",
        "linked passwd": "import os; os.symlink('/etc', 'd'); open('d/passwd')",
        "hard link": f"import os; os.link({target!r}, 'link')",
        "database": f"import sqlite3; sqlite3.connect({target!r})",
        "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
        "datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "listen": "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "resolve": "import socket; socket.gethostbyname('localhost')",
        "url": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "native": "import ctypes; ctypes.CDLL(None).getpid()",
        "kill the parent": "import os; os.kill(os.getppid(), 9)",
        "kill all": "import os; os.kill(-1, 9)",
        "kill the group": "import os; os.killpg(1, 9)",
    }


@pytest.mark.parametrize("name", violations(Path("/x")))
def test_violations_have_a_name(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    mode = outside.stat().st_mode
    done = run(violations(outside)[name])
    assert done.verdict == "violation", done
    assert done.note
    assert outside.read_text() == "untouched"
    assert outside.stat().st_mode == mode
    assert outside.stat().st_nlink == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "sandboxes"]


# The layers below the audit hook, each without those above it.
WITHOUT = [("audit",), ("audit", "namespaces")]
UNNAMED = ["fork", "exec", "network", "listen", "kill the parent", "kill all", "native"]


@LINUX
@pytest.mark.parametrize("without", WITHOUT, ids="-".join)
@pytest.mark.parametrize("name", UNNAMED)
def test_the_kernel_forbids_calls_that_the_hook_did_not_see(
    name: str, without: tuple[str, ...], tmp_path: Path
) -> None:
    need("seccomp")
    program = violations(tmp_path / "outside")[name].replace("getpid", "fork")
    assert sandbox._ask(program, ROOMY, "", without)["verdict"] == "violation"


@LINUX
@pytest.mark.parametrize("without", WITHOUT, ids="-".join)
@pytest.mark.parametrize("name", ["passwd", "write", "append", "remove", "rename", "mode", "link", "linked folder"])
def test_the_kernel_keeps_files_that_the_hook_did_not_see(name: str, without: tuple[str, ...], tmp_path: Path) -> None:
    need("landlock", "seccomp")
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    mode = outside.stat().st_mode
    answer = sandbox._ask(violations(outside)[name], ROOMY, "", without)
    assert answer["verdict"] in ("failed", "violation")
    assert outside.read_text() == "untouched"
    assert outside.stat().st_mode == mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "sandboxes"]


@LINUX
def test_shared_memory_leaves_nothing() -> None:
    need("mounts")
    program = "from multiprocessing import shared_memory as s\ns.SharedMemory('hostile-memory', create=True, size=9)"
    for without in ((), ("audit",)):
        assert sandbox._ask(program, ROOMY, "", without)["verdict"] != "passed"
    assert not Path("/dev/shm/hostile-memory").exists()


DETACH = (
    "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n"
    "        if os.fork() == 0: time.sleep(60)\n        os._exit(0)\n"
)


@LINUX
@pytest.mark.parametrize("without", [("audit", "seccomp"), ("audit", "seccomp", "namespaces")], ids="-".join)
def test_detached_children_die_where_nothing_prevents_them(without: tuple[str, ...]) -> None:
    limits = replace(ROOMY, wall_seconds=3.0)
    assert sandbox._ask(DETACH, limits, "", without, weak=True)["verdict"] in ("passed", "violation")
    assert sandbox._ask(DETACH + "time.sleep(60)", limits, "", without, weak=True)["verdict"] in (
        "timeout",
        "violation",
    )
    # the fixture looks for what is left


@LINUX
def test_processes_that_are_allowed_are_counted_and_ended() -> None:
    limits = replace(ROOMY, processes=3)
    once = "import os\nif os.fork() == 0: os._exit(0)\nassert os.wait()[1] == 0"
    assert run(once, limits).verdict == "passed"
    swarm = "import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(60)\ntime.sleep(60)"
    done = run(swarm, limits)
    assert done.verdict == "violation"
    assert "more than 3 processes" in done.note


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


LOCKED = (
    "import os\nos.makedirs('a/b/c'); open('a/b/c/x', 'w').close()\nfor p in ('a/b/c', 'a/b', 'a', '.'): os.chmod(p, 0)"
)


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["whole", "no namespaces"])
def test_a_folder_without_rights_goes_away(without: tuple[str, ...]) -> None:
    assert sandbox._ask(LOCKED, ROOMY, "", without)["verdict"] in ("passed", "violation")


def test_no_connection_reaches_a_server() -> None:
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]

        def accept() -> None:
            until = time.monotonic() + 30
            while not finished.is_set() and time.monotonic() < until:
                try:
                    seen.append(server.accept())
                except TimeoutError:
                    continue

        finished = threading.Event()
        thread = threading.Thread(target=accept)
        thread.start()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        verdicts = [sandbox._ask(program, ROOMY, "", ())["verdict"]]
        if sys.platform == "linux":
            each = {"network": "namespaces", "seccomp": "seccomp"}
            for left in (name for name in each if active()[name]):
                without = ["audit", "landlock", *(layer for name, layer in each.items() if name != left)]
                verdicts.append(sandbox._ask(program, ROOMY, "", without)["verdict"])
        finished.set()
        thread.join()
    assert seen == []
    assert "passed" not in verdicts


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


@LINUX
def test_a_system_without_walls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = sandbox._ask

    def bare(program: str, limits: Limits, stdin: str, without: tuple = (), weak: bool = False) -> dict:
        return ask(program, limits, stdin, ("namespaces", "seccomp"), weak)

    monkeypatch.setattr(sandbox, "_ask", bare)
    with pytest.raises(ConfigError, match="neither namespaces nor seccomp"):
        execute("print(1)", ROOMY)
    assert "neither namespaces nor seccomp" in (sandbox.supported() or "")
    assert execute("print(1)", ROOMY, weak=True).verdict == "passed"
    assert not sandbox.layers()["network"].startswith("active")


def test_layers_name_what_is_missing() -> None:
    assert set(active()) >= {"limits", "audit", "network", "processes", "mounts"}
    assert all(state.startswith(("active", "missing: ")) for state in sandbox.layers().values())
