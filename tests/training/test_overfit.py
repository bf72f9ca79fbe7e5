"""Each arm learns a short text by heart in a few seconds: nothing between data and optimizer is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from finemoe.runs.run import train
from finemoe.training.optimizers import OPTIMIZERS
from runs.tiny_runs import FEED_FORWARDS, recipe, steps

SOME = ("dense", "deepseek-moe")
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "


# The arms differ in their layers, not in how they are stepped: two of them for each further optimizer.
CASES = [(arm, kind) for kind in OPTIMIZERS for arm in FEED_FORWARDS if kind == "adamw" or arm in SOME]


@pytest.mark.parametrize(("arm", "optimizer"), CASES)
def test_a_repeating_text_is_memorised(arm: str, optimizer: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "text.txt").write_text(TEXT * 20)
    (tmp_path / "validation.txt").write_text(TEXT * 3)
    raw = recipe(
        tmp_path,
        arm,
        training={"steps": 80, "tokens_per_step": 128, "checkpoint_every": 1000},
        optimizer={"kind": optimizer, "learning_rate": 0.03, "weight_decay": 0.0},
    )
    run = train(raw, out=tmp_path / "run", quiet=True)
    assert steps(run.directory)[0]["loss"] > 4
    assert run.summary["final_training_loss"] < 0.1
    assert run.summary["final_validation_loss"] < 0.2
