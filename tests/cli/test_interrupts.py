"""Ctrl-C at any moment of a start: one word, status 130, no traceback; and a worker that never outlives its study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_AT = """
import os, signal, sys
from finemoe.__main__ import main
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, float(sys.argv.pop(1)))
main()
"""


@pytest.mark.parametrize("seconds", [0.02, 0.06, 0.12, 0.2, 0.3, 0.5, 0.8])
def test_an_interrupt_while_it_starts_is_quiet(seconds: float, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _AT, str(seconds), "generate", str(tmp_path), "--prompt", "-"]
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr
    ended = done.returncode in (2, -signal.SIGALRM) and "interrupted" not in done.stderr  # before the moment came
    assert done.returncode == 130 or ended


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


_STUDY = """
import subprocess, sys, os, time
worker = subprocess.Popen([sys.executable, "-m", "finemoe.studies.worker", "no.json", "nowhere", str(os.getpid())],
                          stdin=subprocess.PIPE, start_new_session=True)
print(worker.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it asks twice a second, once it has begun")
@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.08, 0.15, 0.4])
def test_a_worker_ends_when_its_study_is_killed_while_it_starts(seconds: float, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "no.json")  # whoever reads it waits for ever
    with subprocess.Popen([sys.executable, "-c", _STUDY], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        time.sleep(seconds)
        study.kill()
    deadline = time.monotonic() + 10
    while (lives := _alive(worker)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if lives:
        os.kill(worker, signal.SIGKILL)
    assert not lives, "the worker outlives its study"
