"""Killed at any moment, a run goes on and ends bit for bit as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from faults.processes import finish, send, start, wait_for, write_config
from finemoe.checkpoint.run_state.state import find_damage
from finemoe.core.logs import read_json_lines
from finemoe.studies.worker import FINISHED, INTERRUPTED
from runs.tiny_runs import assert_same_run, checkpoints, recipe

STEPS = 24
TRAINING = {"steps": STEPS, "checkpoint_every": 1, "evaluate_every": 7}


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody disturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(recipe(corpus, training=TRAINING), folder / "config.json")
    assert finish(config, folder / "run") == FINISHED
    return folder / "run"


def steps_logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_nine_at_random_moments(corpus: Path, unbroken: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = write_config(recipe(corpus, training=TRAINING), tmp_path / "config.json")
    broken, kills = tmp_path / "run", 0
    for _ in range(4):
        reached = steps_logged(broken)
        process = start(config, broken)
        if rng.random() < 0.75:  # else at any time from the process's first instruction on
            wait_for(lambda reached=reached: steps_logged(broken) > reached or steps_logged(broken) >= STEPS)
        time.sleep(rng.random() * 0.08)
        kills += send(process, signal.SIGKILL) == -signal.SIGKILL
    assert finish(config, broken) == FINISHED
    assert kills >= 2
    assert_same_run(unbroken, broken)
    assert [path.name for path in (broken / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_signal_saves_and_the_run_goes_on(
    corpus: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    raw = recipe(corpus, training={**TRAINING, "checkpoint_every": 1000})
    config = write_config(raw, tmp_path / "config.json")
    broken = tmp_path / "run"
    process = start(config, broken)
    wait_for(lambda: steps_logged(broken) >= 5)
    assert send(process, number) == INTERRUPTED
    [saved] = checkpoints(broken)  # nothing but the signal would have made it
    last = [record for record in read_json_lines(broken / "metrics.jsonl") if record["kind"] == "step"][-1]
    assert saved.name == f"step-{last['step']:08d}"
    assert 5 <= last["step"] < STEPS
    assert not (broken / "summary.json").exists()
    assert finish(config, broken) == FINISHED
    assert_same_run(unbroken, broken)


def being_written(directory: Path) -> bool:
    """Whether there is a checkpoint that has no name yet."""
    return any((directory / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_while_a_checkpoint_is_written_behind_the_run(
    corpus: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = write_config(recipe(corpus, training={**TRAINING, "checkpoint_every": 6}), tmp_path / "config.json")
    broken = tmp_path / "run"
    process = start(config, broken, sync_seconds=0.1)
    wait_for(lambda: being_written(broken) and steps_logged(broken) >= 8)
    code = send(process, number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else INTERRUPTED)
    assert being_written(broken) == (number == signal.SIGKILL)
    assert all(find_damage(path) is None for path in checkpoints(broken))
    if number != signal.SIGKILL:  # the one that was being written, and the one that the signal asked for
        logged = [record["step"] for record in read_json_lines(broken / "metrics.jsonl") if record["kind"] == "step"]
        assert [path.name for path in checkpoints(broken)] == ["step-00000006", f"step-{logged[-1]:08d}"]
    assert finish(config, broken) == FINISHED
    assert_same_run(unbroken, broken)
    assert not being_written(broken)
