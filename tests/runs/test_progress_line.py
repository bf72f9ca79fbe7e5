"""What a run shows while it trains: a live line on a terminal of 80 columns, plain lines on a pipe."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from finemoe.runs import observers
from finemoe.runs.run import train
from methods.grpo.tiny_policy import base, practising
from runs.tiny_runs import recipe, steps

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_terminal_has_one_live_line_that_fits(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(observers, "console", lambda: Console(file=screen, force_terminal=True, width=80))
    run = train(recipe(corpus, training={"evaluate_every": 2}), out=tmp_path / "run")
    lines = [line.rstrip() for line in re.split(r"[\r\n]", ESCAPES.sub("", screen.getvalue())) if line.strip()]
    assert lines
    assert max(map(len, lines)) <= 80
    last = steps(run.directory)[-1]
    assert f"loss {last['loss']:.3f} val {run.summary['final_validation_loss']:.3f}" in lines[-1]
    assert f"MaxVio {last['max_vio']:.2f}" in lines[-1]
    assert "6/6" in lines[-1]


@pytest.mark.parametrize(("width", "shown"), [(80, "length"), (46, "val"), (30, "/6")])
def test_figures_give_way_to_the_step_and_the_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, shown: str
) -> None:
    """A step of GRPO has more figures than columns."""
    start = base(corpus, tmp_path)
    screen = io.StringIO()
    monkeypatch.setattr(observers, "console", lambda: Console(file=screen, force_terminal=True, width=width))
    train(practising(start), out=tmp_path / "run")
    lines = [line.rstrip() for line in re.split(r"[\r\n]", ESCAPES.sub("", screen.getvalue())) if "━" in line]
    assert max(map(len, lines)) <= width
    assert re.match(r"━{10} 6/6 0:00:00", lines[-1])
    assert shown in lines[-1]
    assert "time rollout" not in lines[-1]
    assert "…" not in lines[-1]


def test_a_pipe_has_a_plain_line_at_the_end(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "finemoe"):
        run = train(recipe(corpus, "dense"), out=tmp_path / "run")
    shown = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert len(shown) == 1
    assert shown[0].startswith(f"step 6/6  loss {run.summary['final_training_loss']:.4f}  validation ")
    assert f"validation {run.summary['final_validation_loss']:.4f}" in shown[0]
    assert "MaxVio" not in shown[0]  # nothing is routed
    assert shown[0].endswith(" 0 s left")


def test_tokens_that_are_no_whole_steps_are_told(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = recipe(corpus, "dense")
    step = raw["training"]["tokens_per_step"]
    raw["training"] |= {"tokens": 2 * step + 5, "checkpoint_every": 1}
    del raw["training"]["steps"]
    with caplog.at_level(logging.INFO, "finemoe"):
        train(raw, out=tmp_path / "run")
    told = f"2 steps of {step} tokens: {2 * step:,} of the {2 * step + 5:,} tokens asked for, as steps are whole"
    assert told in caplog.messages
