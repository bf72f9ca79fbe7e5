"""A run that is asked to end while it waits for the verdicts of a measurement: nothing else is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.errors import OutageError
from finemoe.methods.grpo.method import Examination
from finemoe.runs.run import resume, train
from methods.grpo.tiny_policy import base, practising
from runs.tiny_runs import checkpoints, newest_state, records

STEPS, EVERY = 4, 2


@pytest.fixture(scope="module")
def raw(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that saves after its last step only."""
    training = {"steps": STEPS, "evaluate_every": EVERY, "checkpoint_every": 100}
    return practising(base(corpus, tmp_path_factory.mktemp("start")), training=training)


@pytest.fixture(scope="module")
def unbroken(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(raw, out=tmp_path_factory.mktemp("whole") / "run", quiet=True).directory


def ordered(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    found = [record for record in records(directory) if not kinds or record["kind"] in kinds]
    return sorted(found, key=lambda record: (record["step"], record["kind"]))


@pytest.mark.parametrize(
    ("measurement", "number", "step"), [(1, signal.SIGHUP, 0), (2, signal.SIGINT, 2), (3, signal.SIGINT, 4)]
)
def test_the_step_is_kept_and_its_measurement_comes_later(
    raw: dict[str, Any],
    unbroken: Path,
    measurement: int,
    number: signal.Signals,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before the first step, in the middle, and after the last one, behind which no step is lost but the run ends."""
    measure, calls = Examination.__call__, [0]

    def interrupted(self: Examination, model: Any) -> Any:
        calls[0] += 1
        if calls[0] == measurement:
            os.kill(os.getpid(), number)
            raise OutageError("waited for no longer")
        return measure(self, model)

    monkeypatch.setattr(Examination, "__call__", interrupted)
    broken = tmp_path / "run"
    assert train(raw, out=broken, quiet=True).interrupted
    assert f"waited for no longer: step {step} is measured when the run goes on" in caplog.text
    assert not (broken / "summary.json").exists()
    assert [folder.name for folder in checkpoints(broken)] == [f"step-{step:08d}"]
    done_before = [one for one in ordered(unbroken) if one["step"] <= step]
    assert ordered(broken) == [one for one in done_before if (one["kind"], one["step"]) != ("validation", step)]
    done = resume(broken, quiet=True)
    assert not done.interrupted
    assert done.summary["steps"] == STEPS
    assert ordered(broken) == ordered(unbroken)
    assert len(ordered(broken, "validation")) == 1 + STEPS // EVERY
    assert (broken / "rollouts.jsonl").read_text() == (unbroken / "rollouts.jsonl").read_text()
    (tensors, state), (wanted, wanted_state) = newest_state(broken), newest_state(unbroken)
    assert state == wanted_state
    assert all(torch.equal(tensors[name], one) for name, one in wanted.items())


def test_what_does_not_answer_is_an_error_where_nobody_asked_the_run_to_end(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Examination, model: Any) -> Any:
        raise OutageError("nobody is there")

    monkeypatch.setattr(Examination, "__call__", fail)
    with pytest.raises(OutageError, match="nobody is there"):
        train(raw, out=tmp_path / "run", quiet=True)
