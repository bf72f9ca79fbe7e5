"""A child process that answers lines."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest

from finemoe.core.child import ask, below, end, has_ended

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


def test_who_waits_may_look_whether_to_wait_on_and_for_as_long_as_wanted() -> None:
    """While a line goes out, to one who does not read it, and until one comes back; a poll takes 25 days at most."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time\n{ECHO}; time.sleep(60)"],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert ask(child, '{"a": 1}', 1e8) == {"a": 1}

    def enough() -> None:
        raise TimeoutError

    try:
        for request in ("{}", "x" * 1_000_000):
            start = time.monotonic()
            with pytest.raises(TimeoutError):
                ask(child, request, 60, enough)
            assert time.monotonic() - start < 30
    finally:
        end(child)


def test_one_that_has_ended_is_known_and_keeps_its_number() -> None:
    """Else its group could not be ended any more, or another's would be."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", ECHO], start_new_session=True, **pipes)  # type: ignore[call-overload]
    assert ask(child, "{}", 20) == {}
    assert not has_ended(child)
    child.stdin.write(b"unasked\n")
    child.stdin.close()
    until = time.monotonic() + 20
    while not has_ended(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert has_ended(child), "though there is a line that nobody has read"
    assert child.returncode is None
    os.killpg(child.pid, 0)
    end(child)
    assert has_ended(child)


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
