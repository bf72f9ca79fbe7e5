"""Today's trajectories are the recorded ones; `make golden` records them again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.record import GOLDEN, trajectory
from runs.tiny_runs import FEED_FORWARDS, LADDER

RELATIVE = 2e-4  # another CPU adds in another order; a changed formula moves far more


@pytest.mark.parametrize("arm", [*FEED_FORWARDS, *LADDER])
def test_trajectory_is_the_recorded_one(arm: str, corpus: Path, tmp_path: Path) -> None:
    recorded = json.loads(GOLDEN.read_text())[arm]
    found = trajectory(corpus, arm, tmp_path / arm)
    assert found.keys() == recorded.keys()
    for name, values in found.items():
        assert values == pytest.approx(recorded[name], rel=RELATIVE), name


def test_recording_covers_every_arm_and_nothing_else() -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert list(recorded) == [*FEED_FORWARDS, *LADDER]
    assert all(len(figures["loss"]) == 12 for figures in recorded.values())
