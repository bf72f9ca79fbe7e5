"""Each arm learns a short text by heart in a few seconds: nothing between data and optimizer is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from finemoe.runs.run import train
from runs.tiny_runs import FEED_FORWARDS, recipe, steps

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


@pytest.mark.parametrize("arm", FEED_FORWARDS)
def test_a_repeating_text_is_memorised(arm: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "text.txt").write_text(TEXT * 20)
    (tmp_path / "validation.txt").write_text(TEXT * 3)
    raw = recipe(
        tmp_path,
        arm,
        training={"steps": 80, "tokens_per_step": 128, "checkpoint_every": 1000},
        optimizer={"learning_rate": 0.03, "weight_decay": 0.0},
    )
    run = train(raw, out=tmp_path / "run", quiet=True)
    assert steps(run.directory)[0]["loss"] > 4
    assert run.summary["final_training_loss"] < 0.1
    assert run.summary["final_validation_loss"] < 0.2
