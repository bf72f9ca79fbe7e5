"""What a run says beside its figures: where it can be gone on with, and what its checkpoints take."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemoe.parallel.world import ROWS_FIGURE
from finemoe.runs import run as run_module
from finemoe.runs import start as start_module
from finemoe.runs.observers import Warn
from finemoe.runs.run import resume, train
from finemoe.training.alerts import Knobs, Watch
from finemoe.training.method import Note
from finemoe.training.report import StepReport
from runs.tiny_runs import recipe


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Other tests of this process may have asked for more than warnings."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_before_the_first_step_says_where_the_run_lies(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "cut_metrics", stop)
        for begin in (lambda: train(recipe(corpus), out=out, quiet=True), lambda: resume(out, quiet=True)):
            caplog.clear()
            with pytest.raises(KeyboardInterrupt):
                begin()
            assert warned(caplog) == [f"the run has begun: `finemoe resume '{out}'` goes on"]
    assert not resume(out, quiet=True).interrupted


def test_an_interrupt_before_there_is_a_folder_promises_none(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "kernels_for", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(corpus), out=tmp_path / "run", quiet=True)
    assert warned(caplog) == []


def test_a_process_that_receives_most_rows_for_long_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Complaint 14 of distribution: memory runs out, or all wait, and nobody knew that one process had all the rows."""
    warn = Warn(Watch({}, 100, Knobs(0.1, None)), lambda record: None)
    trainer = SimpleNamespace(method=SimpleNamespace(warns=lambda report: ()))
    for step, rows in enumerate([3.0] * 9 + [1.5] + [2.5] * 20, 1):
        figures = {ROWS_FIGURE: rows}
        report = StepReport(step, step, 1.0, {}, 1.0, 0.1, 1.0, 1.0, 1.0, {}, 0, figures=figures)
        warn.after_step(trainer, report)  # type: ignore[arg-type]  # asks the report, and the method for its own words
    [told] = caplog.messages
    assert told.startswith("step 20: for 10 steps the experts of one process have received more than 2 times")


def test_what_is_good_to_know_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    written: list[dict[str, Any]] = []
    warn = Warn(Watch({}, 100, Knobs(0.1, None)), written.append)
    trainer = SimpleNamespace(method=SimpleNamespace(warns=lambda report: (Note("it is done"), "it is not well")))
    with caplog.at_level(logging.INFO, "finemoe"):
        warn.after_step(trainer, StepReport(7, 7, 1.0, {}, 1.0, 0.1, 1.0, 1.0, 1.0, {}, 0))  # type: ignore[arg-type]
    assert [one.levelname for one in caplog.records] == ["INFO", "WARNING"]
    assert [one.get("level") for one in written] == ["note", None]


@pytest.mark.parametrize("nbytes", [2**30, 5 * 2**29])
def test_large_checkpoints_are_told_with_the_key_that_keeps_fewer(
    nbytes: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start_module, "checkpoint_bytes", lambda config: nbytes)
    with caplog.at_level(logging.INFO, "finemoe"):
        train(recipe(corpus, "dense", training={"steps": 1}), out=tmp_path / "run")
    told = [text for text in caplog.messages if "training.keep_checkpoints = 1" in text]
    assert len(told) == (nbytes > 2**30)
    assert all("up to 2.5 GiB on the disk: the last 3 are kept" in text for text in told)
