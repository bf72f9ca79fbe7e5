"""What a method keeps is saved with the run and given back; a checkpoint of another method is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.errors import CheckpointError
from finemoe.runs import run as run_module
from finemoe.runs.config import RunConfig
from finemoe.runs.run import resume, train
from finemoe.training.method import Method, Saved
from finemoe.training.trainer import Trainer
from runs.tiny_runs import recipe


class Counter:
    """Counts what it was asked, and remembers a tensor."""

    def __init__(self) -> None:
        self.seen, self.sum = 0, torch.zeros(2)

    def state(self) -> Saved:
        return Saved({"sum/all": self.sum}, {"seen": self.seen})

    def restore(self, saved: Saved) -> None:
        self.seen, self.sum = saved.values["seen"], saved.tensors["sum/all"].clone()

    def __call__(self, parameters: Any, norm: torch.Tensor) -> dict[str, float]:
        self.seen += 1
        self.sum += norm.detach()
        return {"seen": float(self.seen)}


def keep(monkeypatch: pytest.MonkeyPatch, original: Any, **parts: Counter) -> None:
    """Runs from here on have a method with these parts, which count its steps."""

    def build(config: RunConfig) -> Method[Any]:
        method = original(config)
        return replace(method, before_update=(*method.before_update, *parts.values()), state=parts)

    monkeypatch.setattr(run_module, "build_method", build)


@pytest.fixture
def stopped(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Counter, Any]:
    """A run that was stopped after 2 of 6 steps, what its method had counted, and how methods are built."""
    original, counter = run_module.build_method, Counter()
    keep(monkeypatch, original, counter=counter)
    with monkeypatch.context() as patch:
        run = Trainer.run
        patch.setattr(Trainer, "run", lambda trainer: run(trainer, until=2))
        train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True)
    assert counter.seen == 2
    return tmp_path / "run", counter, original


def test_it_goes_on_where_it_was(stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, before, original = stopped
    after = Counter()
    keep(monkeypatch, original, counter=after)
    assert not resume(directory, quiet=True).interrupted
    assert after.seen == 6
    assert (after.sum > before.sum).all()


@pytest.mark.parametrize("parts", [(), ("other",), ("counter", "other")])
def test_state_of_another_method_is_refused(
    stopped: tuple[Path, Counter, Any], monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]
) -> None:
    directory, _, original = stopped
    keep(monkeypatch, original, **{name: Counter() for name in parts})
    with pytest.raises(CheckpointError, match=r"holds state of \['counter'\].*not of the same run"):
        resume(directory, quiet=True)
