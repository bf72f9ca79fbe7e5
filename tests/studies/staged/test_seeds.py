"""Seeds of a study as processes: one works, one cannot, one is told to stop; and what is told of each."""

from __future__ import annotations

import os
import signal
import threading
import time
import tomllib
from pathlib import Path

from finemoe.studies.staged.seeds import run_seeds
from finemoe.studies.staged.worker import Job, examined
from studies.staged.tiny_study import RECIPE


def job(out: Path, *overrides: str) -> Job:
    return Job(tomllib.loads(RECIPE), "sums.toml", str(out), 0, list(overrides))


def test_seeds_are_processes_whose_failures_are_told(tmp_path: Path) -> None:
    jobs = {"good": job(tmp_path / "good"), "bad": job(tmp_path / "bad", "stage.base.training.tokens_per_step=7")}
    outcome = run_seeds(jobs, 2, "sums", quiet=True)
    assert not outcome.interrupted
    assert list(outcome.failures) == ["bad"]
    assert outcome.failures["bad"].startswith("stage base: ")
    assert examined(tmp_path / "good", "zero").exists()
    assert "tokens_per_step" in (tmp_path / "bad.log").read_text()


def test_a_study_that_is_told_to_stop_tells_its_seeds(tmp_path: Path) -> None:
    began = tmp_path / "long" / "1-base" / "metrics.jsonl"

    def stop() -> None:
        while not began.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    outcome = run_seeds({"long": job(tmp_path / "long", "stage.base.training.steps=100000")}, 1, "sums", quiet=True)
    assert outcome.interrupted
    assert not outcome.failures
    assert list((tmp_path / "long" / "1-base" / "checkpoints").glob("step-*")), "it saved"
