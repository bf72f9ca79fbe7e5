"""What a program must not reach: processes, files, network; each layer of the sandbox without those above it."""

from __future__ import annotations

import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from finemoe.core.errors import ConfigError
from finemoe.sandbox import sandbox
from finemoe.sandbox.sandbox import Limits, execute
from sandbox.hostile import LINUX, ROOMY, SUPPORTED, active, need, run

pytestmark = SUPPORTED


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


SEES = """
import os, pathlib
assert not os.path.exists('/etc/passwd') and not os.path.exists('/proc/self') and not os.path.exists({outside!r})
assert os.getcwd() != '/' and os.listdir('.') == [] and '..' not in os.listdir('/')
for place in ('/', '/etc', '/usr', os.path.dirname(os.getcwd())):
    try: pathlib.Path(place, 'hostile').write_text('x')
    except OSError: pass
    else: raise AssertionError(place)
pathlib.Path('mine').write_text('x')
import json, decimal, sqlite3, hashlib, zoneinfo
for _ in range(9): os.chdir('..')
assert not os.path.exists('etc/passwd') and os.path.exists(pathlib.__file__)
"""


@LINUX
@pytest.mark.parametrize("without", [("audit", "landlock"), ("audit", "landlock", "seccomp")], ids="-".join)
def test_the_hosts_files_are_not_there_where_neither_hook_nor_landlock_keeps_them(
    without: tuple[str, ...], tmp_path: Path
) -> None:
    need("root")
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    answer = sandbox._ask(SEES.format(outside=str(outside)), ROOMY, "", without, weak=True)
    assert answer["verdict"] == "passed", answer
    for name in ("passwd", "write", "append", "linked folder"):
        found = sandbox._ask(violations(outside)[name], ROOMY, "", without, weak=True)
        if name == "passwd":
            assert "No such file" in found["note"]
        assert outside.read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "sandboxes"]


@LINUX
def test_without_a_root_of_its_own_the_other_layers_stand_and_say_so() -> None:
    answer = sandbox._ask("open('/etc/passwd')", ROOMY, "", ("audit", "root"))
    assert answer["verdict"] == "failed"
    assert answer["layers"]["root"] == "missing: left out"
    answer = sandbox._ask("", ROOMY, "", ("namespaces",))
    assert answer["verdict"] == "passed"
    assert answer["layers"]["root"].startswith("missing: ")


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
    assert set(active()) >= {"limits", "audit", "network", "processes", "mounts", "root"}
    assert all(state.startswith(("active", "missing: ")) for state in sandbox.layers().values())
