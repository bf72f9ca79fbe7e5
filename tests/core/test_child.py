"""A child process that answers lines."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from finemoe.core.child import ask, end

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
