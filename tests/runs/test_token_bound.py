"""`training.max_tokens`: a run ends with the step by which it has read so many, and is a finished run then."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import finemoe
from finemoe.charts.run.words import summary as words
from finemoe.core.errors import RunError
from finemoe.runs import observers
from finemoe.runs.config import read_config
from finemoe.runs.listing import look_at
from finemoe.runs.observers import _steps_in_all
from finemoe.runs.report import run_results
from finemoe.runs.run import resume, train
from finemoe.training.report import StepReport
from finemoe.training.trainer import Plan, Trainer
from runs.tiny_runs import LENGTH, assert_same_run, checkpoints, newest_state, recipe, records, steps, stop_after

STEP = 4 * LENGTH
CONSTANT = {"kind": "constant"}


def bounded(corpus: Path, most: int | None, length: int = 50, **tables: Any) -> dict[str, Any]:
    """A run of `length` steps at a constant rate that may read `most` tokens; measured and saved by fours."""
    often = {"evaluate_every": 4, "checkpoint_every": 4}
    raw = recipe(corpus, schedule=CONSTANT, training={"steps": length, **often}, **tables)
    if most is not None:
        raw["training"]["max_tokens"] = most
    return raw


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_a_schedule_that_will_not_come_to_its_end_is_told(
    kind: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(bounded(corpus, 1) | {"schedule": {"kind": kind}}, out=tmp_path / "run")
    assert ("may end the run before its schedule does, which counts 50 steps" in caplog.text) == (kind != "constant")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def no_step(trainer: Trainer, *_: Any) -> StepReport:
    raise AssertionError(f"step {trainer.state.step + 1} of a run that had read its tokens")


@pytest.mark.parametrize(("most", "number"), [(4 * STEP + 1, 5), (5 * STEP, 5), (5 * STEP + 1, 6), (1, 1)])
def test_it_is_the_run_of_as_many_steps(corpus: Path, tmp_path: Path, most: int, number: int) -> None:
    """To the bit, with its last measurement and checkpoint: here neither falls on a step that has one anyway."""
    plain = train(bounded(corpus, None, number), out=tmp_path / "plain", quiet=True)
    run = train(bounded(corpus, most), out=tmp_path / "run", quiet=True)
    assert not run.interrupted
    assert (run.summary["steps"], run.summary["tokens"]) == (number, number * STEP)
    assert [one["step"] for one in records(run.directory) if one["kind"] == "validation"][-1] == number
    assert checkpoints(run.directory)[-1].name == f"step-{number:08d}"
    assert_same_run(plain.directory, run.directory)


def test_steps_may_be_done_first(corpus: Path, tmp_path: Path) -> None:
    run = train(bounded(corpus, 9 * STEP, length=3), out=tmp_path / "run", quiet=True)
    assert run.summary["steps"] == 3
    found = look_at(run.directory)
    assert (found.state, found.done, found.planned) == ("finished", 3, 3)


def test_a_kill_on_the_way_changes_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = bounded(corpus, 6 * STEP)
    whole = train(raw, out=tmp_path / "whole", quiet=True).directory
    original = Trainer.step

    def torn(trainer: Trainer, *arguments: Any) -> StepReport:
        if trainer.state.step == 5:
            raise KeyboardInterrupt
        return original(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", torn)
        with pytest.raises(KeyboardInterrupt):
            train(raw, out=tmp_path / "torn", quiet=True)
    found = look_at(tmp_path / "torn")
    assert (found.state, found.planned) == ("stopped", 50)
    assert resume(tmp_path / "torn", quiet=True).summary["steps"] == 6
    assert_same_run(whole, tmp_path / "torn")


@pytest.mark.parametrize(("length", "key"), [({"steps": 2}, "steps"), ({"tokens": 2 * STEP}, "tokens")])
def test_what_would_train_it_longer_is_the_key_that_the_recipe_has(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, length: dict[str, int], key: str
) -> None:
    raw = recipe(corpus)
    del raw["training"]["steps"]
    raw["training"] |= length
    run = train(raw, out=tmp_path / "run", quiet=True)
    with caplog.at_level(logging.INFO, "finemoe"):
        resume(run.directory, quiet=True)
    assert f"{run.directory} is finished: 2 steps; --set training.{key}=... trains it longer" in caplog.messages


def test_finished_is_finished(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks; and a kill between the last step and the summary leaves no step to do."""
    raw = bounded(corpus, 5 * STEP)
    run = train(raw, out=tmp_path / "run", quiet=True)
    found = look_at(run.directory)
    assert (found.state, found.done, found.planned) == ("finished", 5, 5)
    monkeypatch.setattr(Trainer, "step", no_step)
    with caplog.at_level(logging.INFO, "finemoe"):
        assert resume(run.directory, quiet=True).summary == run.summary
    assert f"{run.directory} is finished: 5 steps; --set training.max_tokens=... trains it longer" in caplog.messages
    assert train(raw, out=run.directory, quiet=True, go_on=True).summary == run.summary
    (run.directory / "summary.json").unlink()
    again = resume(run.directory, quiet=True)
    assert not again.interrupted
    assert again.summary["final_validation_loss"] == run.summary["final_validation_loss"]
    assert (again.summary["steps"], again.summary["tokens"]) == (5, 5 * STEP)
    assert look_at(run.directory).state == "finished"


@pytest.mark.parametrize("change", [f"training.max_tokens={8 * STEP}", f"training.tokens={8 * STEP}"])
def test_a_raised_bound_trains_it_longer(corpus: Path, tmp_path: Path, change: str) -> None:
    """As does a length in tokens, which takes the place of steps and bound."""
    long = train(bounded(corpus, 8 * STEP), out=tmp_path / "long", quiet=True)
    out = train(bounded(corpus, 5 * STEP), out=tmp_path / "run", quiet=True).directory
    run = resume(out, overrides=[change], quiet=True)
    assert (run.summary["steps"], run.summary["tokens"]) == (8, 8 * STEP)
    (ours, _), (theirs, _) = newest_state(out), newest_state(long.directory)
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())
    assert [one["loss"] for one in steps(out)] == [one["loss"] for one in steps(long.directory)]
    assert read_config(out / "config-00000005.json").training.max_tokens == 5 * STEP
    now = read_config(out / "config.json").training
    assert (now.tokens, now.steps, now.max_tokens) in ((None, 50, 8 * STEP), (8 * STEP, None, None))


def test_a_bound_that_is_passed_already_is_refused_with_both_numbers(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = train(bounded(corpus, 5 * STEP), out=tmp_path / "run", quiet=True).directory
    before = bytes_of(out)
    for change in (f"training.max_tokens={3 * STEP}", f"training.max_tokens={5 * STEP}", "training.steps=90"):
        with pytest.raises(RunError, match=r"has read 320 tokens, and training.max_tokens \d+ leaves .* above 320 it"):
            resume(out, overrides=[change], quiet=True)
    assert bytes_of(out) == before
    stop_after(monkeypatch, 3)
    stopped = tmp_path / "stopped"
    assert train(bounded(corpus, 5 * STEP), out=stopped, quiet=True).interrupted
    with pytest.raises(RunError, match=r"has read 192 tokens, and training\.max_tokens 192 leaves nothing"):
        resume(stopped, overrides=["training.max_tokens=192"], quiet=True)
    with caplog.at_level(logging.INFO, "finemoe"):
        assert resume(stopped, overrides=["training.max_tokens=193"], quiet=True).summary["steps"] == 4
    assert "at most 193 tokens instead of 320" in caplog.messages


def test_what_was_read_is_that_of_the_checkpoint_that_it_goes_on_from(corpus: Path, tmp_path: Path) -> None:
    out = train(bounded(corpus, 8 * STEP), out=tmp_path / "run", quiet=True).directory
    (out / "summary.json").unlink()
    (checkpoints(out)[-1] / "state.json").write_text("{")
    assert resume(out, overrides=[f"training.max_tokens={5 * STEP}"], quiet=True).summary["steps"] == 5


def test_what_it_says_of_its_length(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "finemoe"):
        run = train(bounded(corpus, 5 * STEP), out=tmp_path / "run")
    said = "at most 50 steps of 64 tokens, and at most 320 tokens: the step that reaches them is the last"
    assert said in caplog.messages
    (line,) = [one for one in caplog.messages if one.startswith("step ")]
    assert line.startswith("step 5/5  loss ")
    assert line.endswith(" 0 s left")
    assert words(run_results(run.directory))[0].startswith("Step 5 of at most 50, 320 tokens in ")
    assert words(run_results(run.directory))[0].endswith(": it has read the 320 that it may.")


def test_a_live_line_counts_to_where_the_bound_will_end_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(observers, "console", lambda: Console(file=screen, force_terminal=True, width=80))
    train(bounded(corpus, 4 * STEP + 1), out=tmp_path / "run")
    shown = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "━" in line]
    assert " 5/5 " in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[-1])
    assert "/50" not in screen.getvalue()


@pytest.mark.parametrize(
    ("most", "step", "tokens", "expected"),
    [
        (None, 10, 640, 100),
        (6400, 10, 640, 100),
        (1280, 10, 640, 20),
        (1281, 10, 640, 21),
        (640, 10, 640, 10),
        (600, 10, 640, 10),
        (1280, 10, 0, 100),
        (10**9, 10, 640, 100),
    ],
)
def test_steps_are_as_long_as_they_were_so_far(most: int | None, step: int, tokens: int, expected: int) -> None:
    plan = Plan(100, 4, 4, None, bf16=False, max_tokens=most)  # type: ignore[arg-type]
    report: Any = type("Report", (), {"step": step, "tokens": tokens})
    assert _steps_in_all(plan, report) == expected


def test_a_check_counts_as_far_as_the_bound(corpus: Path) -> None:
    found = finemoe.check(bounded(corpus, 5 * STEP - 1), quiet=True)
    assert (found.steps, found.tokens, found.validations) == (5, 5 * STEP - 1, 2)
    (note,) = [one for one in found.notes if "max_tokens" in one]
    assert note == "training.max_tokens ends it before all of its 50 steps, if they stay as long as the first ones"
    assert found.seconds is not None
    assert found.tokens_per_second is not None
    assert found.validation_seconds is not None
    assert found.seconds == pytest.approx(5 * STEP / found.tokens_per_second + 2 * found.validation_seconds)
    free = finemoe.check(bounded(corpus, 99 * STEP), quiet=True)
    assert (free.steps, free.tokens) == (50, 50 * STEP)
    assert not [one for one in free.notes if "max_tokens" in one]


def test_a_page_says_where_a_bounded_run_stands(tmp_path: Path) -> None:
    training = {"steps": 80, "tokens_per_step": 100, "max_tokens": 5000}
    (tmp_path / "config.json").write_text(json.dumps({"name": "x", "training": training}))
    record = {"kind": "step", "step": 40, "tokens": 2000, "loss": 8.0, "seconds": 20.0, "tokens_per_second": 100.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    said = words(run_results(tmp_path))
    assert said[0] == "Step 40 of at most 80, 2.00K tokens in 20 s; it ends with 5.00K tokens."
    assert said[1] == "About 20 s of training left at the speed so far.", "40 steps, and not the 60 of 3,000 tokens"
    for most, left in ((2500, "5.0 s"), (1000, "0.0 s")):
        training["max_tokens"] = most
        (tmp_path / "config.json").write_text(json.dumps({"name": "x", "training": training}))
        assert words(run_results(tmp_path))[1].startswith(f"About {left} of training left")
