"""Runs side by side: what asks the process to end asks them too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemoe.studies import fleet
from finemoe.studies.worker import INTERRUPTED


@pytest.fixture
def hang_ups() -> Iterator[None]:
    """Not ignored, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_every_run_and_is_told(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def start(job: Any) -> Any:
        code = (
            f"import signal, time; signal.signal(15, lambda *_: exit({INTERRUPTED})); print(flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        started.append(process)
        if len(started) == 2:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        return fleet.Active(job, process, tmp_path / "log")

    monkeypatch.setattr(fleet, "_start", start)
    training = SimpleNamespace(total_steps=1)
    config = SimpleNamespace(training=training)
    jobs: Any = [
        SimpleNamespace(name=name, work=1.0, finished=False, directory=tmp_path, config=config) for name in "abc"
    ]
    outcome = fleet.run_fleet(jobs, 2, description="runs", quiet=True)
    assert outcome.interrupted
    assert not outcome.failures
    assert [process.returncode for process in started] == [INTERRUPTED] * 2
