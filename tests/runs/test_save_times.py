"""When a run saves by itself: by steps and by the clock, and what nothing said comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finemoe.core.logs import read_json_lines
from finemoe.runs import run as run_module
from finemoe.runs.run import train
from finemoe.runs.saving import Save
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, recipe

KEEP_ALL = {"keep_checkpoints": 10}


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps."""
    return train(recipe(corpus), out=tmp_path_factory.mktemp("unbroken") / "run", quiet=True).directory


def checkpoint_records(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(directory / "metrics.jsonl") if record["kind"] == "checkpoint"]


def test_where_a_recipe_says_nothing_a_short_run_is_saved_four_times(corpus: Path, tmp_path: Path) -> None:
    """So that a kill does not cost all of it, and analysis has more than its end to look at."""
    raw = recipe(corpus, "dense", training={"checkpoint_every": None, "steps": 10})
    out = train(raw, out=tmp_path / "run", quiet=True).directory
    assert [record["step"] for record in checkpoint_records(out)] == [3, 6, 9, 10]
    assert [path.name for path in checkpoints(out)] == ["step-00000006", "step-00000009", "step-00000010"]


@pytest.mark.parametrize(("minutes", "saved"), [(2.0, [2, 4, 6]), (0.0, [6]), (3.5, [4, 6])])
def test_the_clock_saves_too_and_changes_nothing(
    corpus: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, saved: list[int]
) -> None:
    """A minute a step, by a clock of the test's own; a checkpoint begun by any reason starts it anew."""
    now = [0.0]
    original = Save.after_step

    def a_minute_later(self: Save, trainer: Trainer, report: StepReport) -> None:
        now[0] += 60.0
        original(self, trainer, report)

    monkeypatch.setattr(Save, "after_step", a_minute_later)
    monkeypatch.setattr(run_module, "Save", lambda *arguments: Save(*arguments, clock=lambda: now[0]))
    raw = recipe(corpus, training={**KEEP_ALL, "checkpoint_every": 100, "checkpoint_minutes": minutes})
    out = train(raw, out=tmp_path / "run", quiet=True).directory
    assert [record["step"] for record in checkpoint_records(out)] == saved
    assert_same_run(unbroken, out)
