"""A run goes on longer, or otherwise: what may change, what is refused, and what is kept of how it was."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import ConfigError, RunError
from finemoe.runs.config import read_config
from finemoe.runs.run import resume, train
from finemoe.training.schedule import learning_rate_factor
from finemoe.training.trainer import Trainer
from runs.tiny_runs import assert_same_run, checkpoints, newest_state, recipe, steps

CONSTANT = {"schedule": {"kind": "multi_step", "warmup_share": 0.0, "milestones": []}}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file, to see that nothing was touched."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("length", ["training.steps=10", "training.tokens=640"])
def test_a_finished_run_that_goes_on_is_the_longer_run(corpus: Path, tmp_path: Path, length: str) -> None:
    """Under a schedule that does not depend on the length, bit for bit."""
    long = train(recipe(corpus, training={"steps": 10}, **CONSTANT), out=tmp_path / "long", quiet=True).directory
    out = train(recipe(corpus, **CONSTANT), out=tmp_path / "run", quiet=True).directory
    run = resume(out, overrides=[length], quiet=True)
    assert run.summary["steps"] == 10
    assert_same_tensors(long, out)
    assert [record["loss"] for record in steps(out)] == [record["loss"] for record in steps(long)]
    assert json.loads((out / "summary-00000006.json").read_text())["steps"] == 6
    assert read_config(out / "config-00000006.json").training.total_steps == 6
    assert read_config(out / "config.json").training.total_steps == 10
    assert resume(out, quiet=True).summary == run.summary


def assert_same_tensors(left: Path, right: Path) -> None:
    (ours, _), (theirs, _) = newest_state(left), newest_state(right)
    assert ours.keys() == theirs.keys()
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())


def test_the_schedule_is_that_of_the_new_length_from_there_on(corpus: Path, tmp_path: Path) -> None:
    schedule = {"kind": "cosine", "warmup_share": 0.0}
    out = train(recipe(corpus, schedule=schedule), out=tmp_path / "run", quiet=True).directory
    resume(out, overrides=["training.steps=12"], quiet=True)
    config = read_config(out / "config.json")
    rates = [record["learning_rate"] for record in steps(out)]
    expected = [0.01 * learning_rate_factor(config.schedule, step, 6 if step < 6 else 12) for step in range(12)]
    assert rates == pytest.approx(expected)
    assert rates[6] > rates[5]


def test_an_interrupted_run_may_become_longer_shorter_and_slower(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        original = Trainer.step

        def stop_at_3(trainer: Trainer, *arguments: Any) -> Any:
            report = original(trainer, *arguments)
            if report.step == 3:
                trainer.request_stop()
            return report

        patched.setattr(Trainer, "step", stop_at_3)
        out = tmp_path / "run"
        assert train(recipe(corpus), out=out, quiet=True).interrupted
    changes = ["training.steps=5", "optimizer.learning_rate=0.002", "training.checkpoint_every=1"]
    run = resume(out, overrides=changes, quiet=True)
    assert run.summary["steps"] == 5
    assert steps(out)[-1]["learning_rate"] <= 0.002
    assert [path.name for path in checkpoints(out)][-2:] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=32", "model.hidden_size"),
        ("data.sequence_length=8", "data.sequence_length"),
        ("data.corpus.paths=['x']", "data.corpus.paths"),
        ("seed=3", "seed"),
        ("method.kind=pretraining", "method.kind"),
        ("optimizer.kind=muon", "optimizer.kind"),
        ("training.tokens_per_step=128", "training.tokens_per_step"),
        ("training.threads=2", "training.threads"),
        ("start_from=x", "start_from"),
    ],
)
def test_what_would_change_the_past_is_refused_by_name(corpus: Path, tmp_path: Path, override: str, named: str) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory
    before = snapshot(out)
    with pytest.raises(RunError, match=f": {named} cannot be changed any more"):
        resume(out, overrides=["training.steps=9", override], quiet=True)
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.steps=6"], "has done 6 steps, which leaves nothing to train: with training.steps above 6"),
        (["training.tokens=200"], "with training.tokens above 384 it goes on"),
        (["optimizer.learning_rate=0.1"], "leaves nothing to train"),
        (["training.step=9"], "unknown key `training.step`, did you mean"),
        (["training.steps=many"], "training.steps"),
        (["training.steps=9", "training.tokens=640"], "exactly one of"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_touched(
    corpus: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory
    before = snapshot(out)
    with pytest.raises((RunError, ConfigError), match=message):
        resume(out, overrides=overrides, quiet=True)
    assert snapshot(out) == before


def test_a_kill_between_summary_and_configuration_leaves_a_run_to_go_on_with(corpus: Path, tmp_path: Path) -> None:
    whole = train(recipe(corpus), out=tmp_path / "whole", quiet=True).directory
    out = train(recipe(corpus), out=tmp_path / "run", quiet=True).directory
    (out / "summary.json").replace(out / "summary-00000006.json")  # what `write_changes` does first
    assert resume(out, quiet=True).summary["steps"] == 6
    assert_same_run(whole, out)
    assert resume(out, overrides=["training.steps=8"], quiet=True).summary["steps"] == 8


def test_an_arm_of_a_comparison_stays_as_long_as_the_others(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    out = train(recipe(corpus, "dense"), out=tmp_path / "arms" / "dense" / "seed-0", quiet=True).directory
    with pytest.raises(RunError, match="belongs to the comparison"):
        resume(out, overrides=["training.steps=8"], quiet=True)


def test_what_cannot_go_on_is_found_before_anything_is_changed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory
    before = snapshot(out)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio is not installed"):
        resume(out, overrides=["training.steps=8", "training.trackers=['trackio']"], quiet=True)
    assert snapshot(out) == before


def test_a_change_that_was_asked_for_is_no_surprise_after_a_kill(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory
    with monkeypatch.context() as patched:
        patched.setattr("finemoe.runs.run._run", lambda *given: None)  # killed before its first new checkpoint
        resume(out, overrides=["training.steps=8"], quiet=True)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert resume(out, quiet=True).summary["steps"] == 8
    assert "no longer the run that began here" not in caplog.text


def test_a_run_that_was_changed_is_gone_on_with_and_one_warning_says_what_differs(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory
    resume(out, overrides=["training.steps=8", "optimizer.learning_rate=0.005"], quiet=True)
    resume(out, overrides=["training.steps=9"], quiet=True)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        now = {"training": {"steps": 9}, "optimizer": {"learning_rate": 0.005}}
        assert train(recipe(corpus, "dense", **now), out=out, quiet=True, go_on=True).summary["steps"] == 9
        assert "finemoe resume --set" not in caplog.text, "it is the run that is described"
        assert train(recipe(corpus, "dense"), out=out, quiet=True, go_on=True).summary["steps"] == 9
    (said,) = [one for one in caplog.messages if "finemoe resume --set" in one]
    assert "(training.steps, optimizer.learning_rate)" in said


def test_of_two_that_change_a_run_at_once_the_second_is_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(recipe(corpus, "dense"), out=tmp_path / "run", quiet=True).directory

    @contextmanager
    def after_another(directory: Path) -> Iterator[None]:
        monkeypatch.undo()
        resume(directory, overrides=["training.steps=8"], quiet=True)
        yield

    monkeypatch.setattr("finemoe.runs.run.sole_writer", after_another)
    with pytest.raises(RunError, match="another process has changed the run meanwhile"):
        resume(out, overrides=["training.steps=10"], quiet=True)
    assert json.loads((out / "summary.json").read_text())["steps"] == 8
