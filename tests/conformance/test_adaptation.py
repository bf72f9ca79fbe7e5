"""Every method with every choice of what may move: it trains, is torn away in a step, and goes on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.methods import METHODS
from finemoe.methods.trainables import TRAINABLES
from finemoe.runs.run import resume, train
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer
from methods.tiny_adaptations import ADAPT, MOVE, begin_all, of_kinds
from methods.tiny_talks import weights
from runs.tiny_runs import assert_same_run, checkpoints, corpus, steps

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 in miniature, what it is to learn, and the experts that it may move."""
    return begin_all(corpus, tmp_path_factory.mktemp("adapt"))


def test_every_kind_is_tried() -> None:
    assert set(ADAPT) == set(METHODS) - {"pretraining"}
    assert set(MOVE) == set(TRAINABLES)


class Killed(BaseException):
    """What a kill leaves behind: nothing is saved on the way out."""


def kill_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run is torn away in the middle of `step`, after the update."""
    original = Trainer.step

    def stepping(trainer: Trainer, *arguments: Any) -> StepReport:
        report = original(trainer, *arguments)
        if report.step == step:
            monkeypatch.setattr(Trainer, "step", original)
            raise Killed
        return report

    monkeypatch.setattr(Trainer, "step", stepping)


@pytest.mark.parametrize("moving", MOVE)
@pytest.mark.parametrize("method", ADAPT)
def test_torn_away_and_resumed_is_the_unbroken_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, moving: str
) -> None:
    raw = of_kinds(base, method, moving)
    train(raw, out=tmp_path / "unbroken", quiet=True)
    kill_in(monkeypatch, 5)  # when that of step 4 was begun, the checkpoint of step 2 is there
    with pytest.raises(Killed):
        train(raw, out=tmp_path / "broken", quiet=True)
    assert checkpoints(tmp_path / "broken")
    assert not resume(tmp_path / "broken", quiet=True).interrupted
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    trained = steps(tmp_path / "unbroken")
    assert len(trained) == 6
    before, after = weights(base), weights(tmp_path / "unbroken")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    still = {
        "everything": ("router", "embedding", "mtp."),
        "names": ("blocks.0.feed_forward", "embedding", "mtp."),
        "lora": ("norm", "router", "embedding", "head", "mtp.", "blocks.0.feed_forward"),
        "experts": ("attention", "norm", "router", "shared", "embedding", "head", "mtp.", "blocks.0."),
    }
    assert not [name for name in moved if any(part in name for part in still.get(moving, ()))]
