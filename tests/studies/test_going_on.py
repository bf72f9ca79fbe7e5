"""What a comparison asks for when it goes on, and what a damaged trial of its tuning says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from finemoe.core.errors import RunError
from finemoe.runs.config import read_config
from finemoe.runs.start import checkpoint_bytes
from finemoe.studies import compare as compare_module
from finemoe.studies.compare import compare, go_on
from runs.tiny_runs import LENGTH
from studies.in_process import run_here
from studies.test_compare import recipe


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.studies.study.run_fleet", run_here)
    monkeypatch.setattr(compare_module, "write_results", lambda results, directory: None)
    monkeypatch.setattr("finemoe.studies.results._samples", lambda run, tokenizer, prompts: [])


def test_room_is_asked_for_the_runs_that_are_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are finished have their checkpoints; what fitted at first goes on although the disk is fuller now."""
    out = compare(recipe(corpus), out=tmp_path / "cmp", quiet=True).directory
    largest = max(checkpoint_bytes(read_config(path)) for path in out.glob("arms/*/seed-?/config.json"))
    free = SimpleNamespace(free=0)
    monkeypatch.setattr("finemoe.runs.start.shutil.disk_usage", lambda path: free)
    assert go_on(out, quiet=True).results["complete"]
    shutil.rmtree(out / "arms" / "switch" / "seed-1")
    with pytest.raises(RunError, match="checkpoints need"):
        go_on(out, quiet=True)
    free.free = largest
    assert go_on(out, quiet=True).results["complete"]


def test_a_finished_comparison_is_read_again_however_little_memory_is_free(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = compare(recipe(corpus, seeds=[0]), out=tmp_path / "cmp", quiet=True).directory
    monkeypatch.setattr("finemoe.runs.footprint.memory.available_bytes", lambda: 1)
    assert go_on(out, quiet=True).results["complete"]


def test_a_trial_whose_summary_lost_its_loss_is_named(corpus: Path, tmp_path: Path) -> None:
    tuning = {"tokens": 4 * 4 * LENGTH, "learning_rates": [0.01, 0.02]}
    out = compare(recipe(corpus, seeds=[0], tuning=tuning), out=tmp_path / "cmp", quiet=True).directory
    damaged = out / "tuning" / "switch" / "lr-0.02" / "summary.json"
    kept = json.loads(damaged.read_text())
    kept.pop("final_validation_loss")
    damaged.write_text(json.dumps(kept))
    with pytest.raises(RunError, match=r"lr-0\.02/summary\.json: .*remove it, and the same command writes it again"):
        go_on(out, quiet=True)
    damaged.unlink()
    assert go_on(out, quiet=True).results["complete"]
