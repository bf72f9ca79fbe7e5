"""`finemoe train` by GRPO, killed by the system within a rollout: resumed, it learns from the very same answers."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from faults.processes import send, start_command, wait_for
from finemoe.runs.run import train
from methods.grpo.tiny_policy import base, practising
from runs.tiny_runs import assert_same_run, checkpoints, steps


def test_kill_nine_within_a_rollout(corpus: Path, tmp_path: Path) -> None:
    """Four steps on each rollout, and a checkpoint after every third: the first three lie within one."""
    method = {"steps_per_rollout": 2, "inner_epochs": 2, "replay": "update", "dynamic_sampling": 1}
    training = {"steps": 32, "checkpoint_every": 3, "evaluate_every": 32}
    recipe, log, broken = tmp_path / "recipe.json", tmp_path / "log", tmp_path / "broken"
    recipe.write_text(json.dumps(practising(base(corpus, tmp_path), method, training=training)))
    unbroken = train(recipe, out=tmp_path / "unbroken", quiet=True).directory
    process = start_command("train", recipe, "--out", broken, "-q", log=log)
    metrics = broken / "metrics.jsonl"
    wait_for(lambda: bool(checkpoints(broken)) and metrics.read_bytes().count(b'"kind": "step"') >= 5)
    assert send(process, signal.SIGKILL) == -signal.SIGKILL, log.read_text()
    assert len(steps(broken)) < 32
    process = start_command("resume", broken, "-q", log=log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    assert_same_run(unbroken, broken)
    assert (broken / "rollouts.jsonl").read_text() == (unbroken / "rollouts.jsonl").read_text()
