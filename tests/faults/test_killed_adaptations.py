"""`finemoe train` on conversations, killed by the system at any moment: resumed, it is the run left in peace."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from faults.processes import send, start_command, wait_for
from finemoe.checkpoint.run_state.state import find_damage
from methods.tiny_adaptations import ADAPT, MOVE, begin_all, of_kinds
from runs.tiny_runs import assert_same_run, checkpoints, steps

STEPS = 12
_FEW = {("sft", "everything"), ("dpo", "lora"), ("distill", "child")}
PAIRS = [
    pytest.param(method, moving, marks=() if (method, moving) in _FEW else pytest.mark.slow, id=f"{method}-{moving}")
    for method in ADAPT
    for moving in MOVE
]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all of them begin with, and beside it what they learn."""
    return begin_all(corpus, tmp_path_factory.mktemp("killed"))


def finish(*arguments: str | Path, log: Path) -> None:
    """The command, to its end."""
    process = start_command(*arguments, log=log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()


def steps_logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def files_of(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds: bytes by name, and of the state and the list of hashes what no clock decides."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    state, manifest = (json.loads(found.pop(name)) for name in ("state.json", "manifest.json"))
    state.pop("seconds")
    manifest["files"].pop("state.json")
    return {**found, "state": state, "manifest": manifest}


@pytest.mark.parametrize(("method", "moving"), PAIRS)
def test_kill_nine_and_resume_is_the_unbroken_run(base: Path, tmp_path: Path, method: str, moving: str) -> None:
    training = {"steps": STEPS, "checkpoint_every": 1, "evaluate_every": 5}
    recipe, log = tmp_path / "recipe.json", tmp_path / "log"
    recipe.write_text(json.dumps(of_kinds(base, method, moving, training=training)))
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish("train", recipe, "--out", unbroken, "-q", log=log)

    draw = random.Random(f"{method} {moving}")
    process, kills = start_command("train", recipe, "--out", broken, "-q", log=log), 0
    for first in (2, 6):  # twice: the second kill is of a run that was killed before
        moment = draw.randint(first, first + 2)
        wait_for(lambda moment=moment: bool(checkpoints(broken)) and steps_logged(broken) >= moment)
        time.sleep(draw.random() * 0.03)
        kills += send(process, signal.SIGKILL) == -signal.SIGKILL
        assert find_damage(checkpoints(broken)[-1]) is None  # the oldest may be half removed
        process = start_command("resume", broken, "-q", log=log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert kills
    assert len(steps(broken)) == STEPS
    assert_same_run(unbroken, broken)
    assert files_of(checkpoints(unbroken)[-1]) == files_of(checkpoints(broken)[-1])
