"""A child process that answers lines."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest

from finemoe.core.child import ask, below, end

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_process_with_more_than_a_thousand_files_open_reads_its_child() -> None:
    """As a server with many clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("no more files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        child = subprocess.Popen([sys.executable, "-c", ECHO], start_new_session=True, **pipes)  # type: ignore[call-overload]
        assert child.stdout.fileno() >= 1024
        assert ask(child, '{"a": 1}', 20) == {"a": 1}
        assert ask(child, '{"a": 2}', 20) == {"a": 2}
        child.kill()
        child.wait()
        assert ask(child, '{"a": 3}', 1) is None
        end(child)
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_a_child_started_ends_though_the_child_ended_first() -> None:
    """Before anybody has waited for it, its group is still known by its number."""
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    sleeper = int(child.stdout.readline())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert _state(sleeper) == "S"
    end(child)
    until = time.monotonic() + 10
    while _state(sleeper) not in ("", "Z") and time.monotonic() < until:
        time.sleep(0.01)
    assert _state(sleeper) in ("", "Z")


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0]
    except OSError:
        return ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_all_below_a_process_are_found() -> None:
    code = "import subprocess, sys; subprocess.run(['sh', '-c', 'sleep 60 & sleep 60 & echo; wait'])"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    found = below(child.pid)
    assert len(found) == 3
    assert child.pid in below(os.getpid())
    end(child)
    assert below(child.pid) == []
