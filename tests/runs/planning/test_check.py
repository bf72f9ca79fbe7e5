"""`finemoe.check`: what a run will take is said before it is run, and nothing is left of the asking."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import finemoe
from finemoe.core import memory
from finemoe.core.errors import ConfigError
from finemoe.runs.config import resolve_run
from finemoe.runs.footprint import footprint
from finemoe.runs.planning.check import Check, _Pace
from finemoe.runs.planning.machine import other_work
from finemoe.training.trainer import Trainer
from runs.tiny_runs import LENGTH, recipe, steps, write_corpus

TOKENS = 4 * LENGTH


def test_figures_are_those_of_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = recipe(corpus)
    found = finemoe.check(raw, quiet=True)
    assert list(tmp_path.iterdir()) == []  # no run directory, nor anything else
    assert found.refused == ()
    run = finemoe.train(raw, out=tmp_path / "run", quiet=True)
    summary, data = run.summary, json.loads((run.directory / "data.json").read_text())
    assert found.losses == tuple(step["loss"] for step in steps(run.directory))  # its own first steps, bit for bit
    assert (found.steps, found.steps_measured, found.tokens) == (6, 6, summary["tokens"])
    for name in ("total_parameters", "active_parameters"):
        assert getattr(found, name) == summary[name]
    assert (found.training_tokens, found.validation_tokens) == (data["tokens"]["train"], data["tokens"]["validation"])
    assert found.documents == 9
    assert found.vocab_size == data["vocab_size"]
    assert found.passes == found.tokens / data["tokens"]["train"]
    assert found.seconds is not None
    assert found.tokens_per_second is not None
    assert found.validation_seconds is not None
    expected = found.tokens / found.tokens_per_second + found.validations * found.validation_seconds
    assert found.seconds == pytest.approx(expected)
    assert found.validations == 6
    assert (run.directory / "checkpoints").is_dir()


def test_ten_steps_are_measured_and_the_first_do_not_count(corpus: Path) -> None:
    found = finemoe.check(recipe(corpus), overrides=["training.steps=400"], quiet=True)
    assert (found.steps, found.steps_measured, len(found.losses)) == (400, 10, 10)
    assert found.validations == 10
    pace = _Pace(lambda _: None, [9.0, 5.0, 1.0, 1.0, 3.0])
    assert pace.seconds_a_step() == 1.0
    assert _Pace(lambda _: None, [9.0]).seconds_a_step() == 9.0
    assert _Pace(lambda _: None, [9.0, 5.0]).seconds_a_step() == 5.0


def test_where_shard_is_left_out_the_fewest_processes_are_checked(corpus: Path) -> None:
    """As many as torchrun will start take their share; a check does not know how many those are."""
    found = finemoe.check(recipe(corpus, "v3", parallel={"expert": 2}), quiet=True, steps=1)
    assert not found.refused
    assert found.layout == "shard 2, expert 2"
