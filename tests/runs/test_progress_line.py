"""What a run shows while it trains: a live line on a terminal of 80 columns, plain lines on a pipe."""

from __future__ import annotations

import io
import logging
import re
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.logging import RichHandler

from finemoe.core import logs
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.method import shown_of
from finemoe.runs import observers
from finemoe.runs.run import train
from finemoe.training.directory import read_metrics
from finemoe.training.method import Shown
from finemoe.training.report import StepReport
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


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (
            80,
            ["reward", "length", "kl", "dead", "steps", "rollout/reward/update", "clip", "entropy", "mismatch"],
        ),
        (46, ["reward", "length", "kl", "dead"]),
        (30, ["reward", "length"]),
    ],
)
def test_a_run_that_answers_itself_has_two_live_lines_of_whole_figures(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, shown: list[str]
) -> None:
    """A step of GRPO has more figures than columns: the least important ones go, and none is cut."""
    start = base(corpus, tmp_path)
    screen = io.StringIO()
    monkeypatch.setattr(observers, "console", lambda: Console(file=screen, force_terminal=True, width=width))
    form = {"kind": "format", "name": "steps", "form": "markers", "opens": "<", "closes": ">", "weight": 0.0}
    raw = practising(start)
    raw["method"]["rewards"].append(form)
    train(raw, out=tmp_path / "run")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", screen.getvalue())) if line.strip()]
    assert max(map(len, lines)) <= width
    assert re.match(r"6/6 0:00:00 reward [0-9.]+", lines[-2])
    assert re.findall(r"[a-z/]+(?= )", f"{lines[-2][12:]} {lines[-1]}")[: len(shown)] == shown
    for line in lines[-2:]:
        assert re.fullmatch(r"([a-z/]+ <?-?[0-9./e-]+( %)? ?)+", line.partition("0:00:00 ")[2] or line), line
    percents = re.search(r"rollout/reward/update (\d+)/(\d+)/(\d+) %", lines[-1])
    assert percents is not None or width < 80
    assert percents is None or 98 <= sum(map(int, percents.groups())) <= 102


def test_80_columns_hold_all_that_a_step_of_a_long_run_has() -> None:
    """Numbers as wide as they come; what was measured on held-out questions has lines of its own."""
    figures = {"reward": -0.914, "length": 1234.5, "dead_groups": 1.0, "reward_format": 1.0, "clip_share": 0.0031,
               "kl": 0.00147, "entropy": 0.0253, "expert_mismatch": 0.0034,
               "time_rollout": 0.76, "time_reward": 0.1, "time_update": 0.14}  # fmt: skip
    report = StepReport(1, 1, 0.0, {}, 0.0, 0.0, 1.0, 1.0, 1.0, {}, 0, figures=figures)
    config = GRPOConfig.model_validate({"rewards": [{"kind": "answer"}, {"kind": "format", "form": "think"}]})
    shown = observers.shown_figures(report, shown_of(config))
    first = 80 - len("1000/1000 100:00:00 ")
    assert observers.flow(shown, [first, 80]) == [
        "reward -0.914 length 1234 kl 0.00147 dead 100 % format 100 %",
        "rollout/reward/update 76/10/14 % clip 0.3 % entropy 0.0253 mismatch 0.3 %",
    ]


def test_a_run_that_answers_itself_says_all_of_every_step_on_a_pipe(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "finemoe"):
        run = train(practising(base(corpus, tmp_path), training={"evaluate_every": 3}), out=tmp_path / "run")
    plain = [one for one in caplog.messages if re.match(r"step \d/6  ", one)]
    assert len(plain) == 6
    wanted = ("reward", "length", "kl", "dead", "rollout/reward/update", "clip", "entropy", "mismatch", "validation")
    assert [title for title in wanted if f"  {title} " not in plain[-1]] == []
    told = [one for one in caplog.messages if "; asked " in one]
    assert [one.split(":")[0] for one in told] == ["step 0", "step 3", "step 6"]
    answers = [one for one in caplog.messages if one.startswith("  answer worth ")]
    assert len(answers) == 3
    assert max(map(len, [*told, *answers])) <= 80
    assert f"validation {run.summary['final_validation_reward']:.3f}" in told[-1]


def test_shares_of_a_step_are_of_the_step_alone(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured between two steps writes answers too, and would make learning look slow."""
    measured = observers.Evaluate.after_step

    def slow(self: observers.Evaluate, trainer: Any, report: Any) -> None:
        time.sleep(1.0 if report.step == 3 else 0.0)
        measured(self, trainer, report)

    monkeypatch.setattr(observers.Evaluate, "after_step", slow)
    run = train(practising(base(corpus, tmp_path)), out=tmp_path / "run", quiet=True)
    found = [one["figures"] for one in read_metrics(run.directory) if one["kind"] == "step"]
    for figures in found:
        assert sum(figures[f"time_{name}"] for name in ("rollout", "reward", "update")) == pytest.approx(1.0)
        assert figures["time_scoring"] <= figures["time_update"]
    usual = statistics.median(figures["time_rollout"] for figures in found)
    assert found[3]["time_rollout"] > usual / 3, "what was waited for before a step is no part of it"


@pytest.mark.parametrize(
    ("value", "percent", "shown"),
    [(0.9996, True, "100"), (0.004, True, "0.4"), (0.0001, True, "<0.1"), (0.0, True, "0"), (1.0, True, "100"),
     (1234.5, False, "1234"), (0.01234, False, "0.0123")],
)  # fmt: skip
def test_shares_are_percents(value: float, percent: bool, shown: str) -> None:
    report = StepReport(1, 1, 0.0, {}, 0.0, 0.0, 1.0, 1.0, 1.0, {}, 0, figures={"it": value})
    assert observers.shown_figures(report, [Shown("it", ("it",), percent)]) == [f"it {shown}{' %' * percent}"]
    assert observers.shown_figures(report, [Shown("other", ("it", "absent"))]) == []


def test_what_is_logged_makes_room_for_itself_above_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two consoles would write into each other's line: `dead groups 1w` was followed by `arning`."""
    screen, other = io.StringIO(), io.StringIO()
    handler = RichHandler(console=Console(file=other, force_terminal=True, width=80), show_time=False, show_path=False)
    monkeypatch.setattr(logs.logger, "handlers", [handler])
    with logs.said_above(Console(file=screen, width=80)):
        logs.logger.warning("step 50: it is told")
    assert "step 50: it is told" in screen.getvalue()
    logs.logger.warning("afterwards")
    assert "afterwards" in other.getvalue()
    assert "step 50" not in other.getvalue()


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
