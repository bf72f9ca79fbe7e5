"""A terminal that is closed, a pipe that nobody reads: nothing is lost, in processes as a user starts them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.processes import finish, send, start, wait_for, write_config
from finemoe.core.logs import read_json_lines
from finemoe.runs.run import train
from finemoe.studies.worker import FINISHED, INTERRUPTED
from runs.tiny_runs import assert_same_run, checkpoints, recipe

STEPS = 24
TRAINING = {"steps": STEPS, "checkpoint_every": 1000, "evaluate_every": 7}


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody disturbed."""
    return train(recipe(corpus, training=TRAINING), out=tmp_path_factory.mktemp("whole") / "run", quiet=True).directory


def steps_logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def command(corpus: Path, folder: Path, out: Path, **training: object) -> list[str]:
    """`finemoe train`, on a recipe with a step that takes its time."""
    config = folder / "recipe.json"
    config.write_text(json.dumps(recipe(corpus, training={**TRAINING, **training})))
    return [sys.executable, "-m", "finemoe", "train", str(config), "--out", str(out)]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (signal.SIGXCPU, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
        ),
    ],
)
def test_a_hang_up_or_warning_saves_and_the_run_goes_on(
    corpus: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGXCPU is what `ulimit -t` sends, SIGUSR1 and SIGUSR2 what batch systems send before the time is over."""
    config = write_config(recipe(corpus, training=TRAINING), tmp_path / "config.json")
    broken = tmp_path / "run"
    process = start(config, broken)
    wait_for(lambda: steps_logged(broken) >= 5)
    assert send(process, number) == INTERRUPTED
    [saved] = checkpoints(broken)
    last = [record for record in read_json_lines(broken / "metrics.jsonl") if record["kind"] == "step"][-1]
    assert saved.name == f"step-{last['step']:08d}"
    assert finish(config, broken) == FINISHED
    assert_same_run(unbroken, broken)


def test_the_second_hang_up_of_a_closed_terminal_does_not_end_the_saving(
    corpus: Path, unbroken: Path, tmp_path: Path
) -> None:
    """The shell sends one, and so does the system; a disk that takes its time is caught between them."""
    config = write_config(recipe(corpus, training=TRAINING), tmp_path / "config.json")
    broken = tmp_path / "run"
    process = start(config, broken, sync_seconds=0.1)
    wait_for(lambda: steps_logged(broken) >= 5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGHUP)
    wait_for(lambda: any((broken / "checkpoints").glob(".writing-*")))
    for _ in range(2):  # a multiplexer between them may send one of its own
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(0.05)
    process.join(60)
    assert process.exitcode == INTERRUPTED
    assert len(checkpoints(broken)) == 1
    assert finish(config, broken) == FINISHED
    assert_same_run(unbroken, broken)


def test_a_hang_up_that_was_ignored_stays_ignored(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """What nohup does before it starts a program."""
    out = tmp_path / "run"
    words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command(corpus, tmp_path, out)]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
    wait_for(lambda: steps_logged(out) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert_same_run(unbroken, out)


def test_a_reader_that_goes_leaves_the_run_going_on(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    """`finemoe train ... 2>&1 | head -1`."""
    out = tmp_path / "run"
    process = subprocess.Popen(command(corpus, tmp_path, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) in (0, 1)  # 1: the summary could not be printed
    assert (out / "summary.json").exists()
    assert_same_run(unbroken, out)


@pytest.mark.slow
def test_output_that_was_closed_from_the_start(corpus: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command(corpus, tmp_path, out)]
    assert subprocess.run(words, check=False, timeout=60).returncode == 0
    assert_same_run(unbroken, out)


@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_terminal_that_is_closed(corpus: Path, tmp_path: Path, ignored: bool) -> None:
    """Its run saves and stops; one that ignores the signal goes on, though every word to the terminal now fails."""
    out = tmp_path / "run"
    words = command(corpus, tmp_path, out, steps=400)
    if ignored:
        words = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *words]
    child, terminal = pty.fork()
    if child == 0:  # the new process, whose terminal is ours to close
        os.execvpe(words[0], words, {**os.environ, "TERM": "xterm"})
    deadline = time.monotonic() + 60
    os.set_blocking(terminal, False)
    while steps_logged(out) < 3 and time.monotonic() < deadline:
        try:
            os.read(terminal, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if ignored:
        assert os.waitstatus_to_exitcode(status) in (0, 1, 2)  # the summary had nowhere to go
        assert json.loads((out / "summary.json").read_text())["steps"] == 400
    else:
        assert os.waitstatus_to_exitcode(status) == 130
        assert not (out / "summary.json").exists()
        assert len(checkpoints(out)) == 1
