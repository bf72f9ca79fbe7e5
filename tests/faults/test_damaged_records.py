"""One record of metrics.jsonl that is JSON and yet none of ours: it is left out, and everything goes on without it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.analysis.load import history
from finemoe.charts.run.figures import figures
from finemoe.charts.run.page import run_page
from finemoe.runs.listing import list_runs
from finemoe.runs.report import run_results, thinned
from finemoe.runs.result import Run
from finemoe.runs.run import resume, train
from finemoe.training.directory import read_metrics
from runs.tiny_runs import recipe

ALERT = {"kind": "alert", "step": 6, "layer": 1, "level": "uneven", "message": "layer 1, uneven: ..."}
DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a layer of 5,000 digits": lambda one: one["load"].update({"9" * 5000: one["load"]["1"]}),
    "a layer with two spellings": lambda one: one["load"].update({"01": one["load"]["1"]}),
    "a share in place of a count": lambda one: one["load"]["1"].__setitem__(1, float("nan")),
    "MaxVio of a layer as a list": lambda one: one["max_vio_per_layer"].update({"1": [0.5, 1]}),
    "a gradient in words": lambda one: one.update(gradient_norm="large"),
    "a learning rate in words": lambda one: one.update(learning_rate={}),
    "endless time": lambda one: one.update(seconds=float("inf")),
    "no number of tokens": lambda one: one.update(tokens=float("nan")),
    "step 0": lambda one: one.update(step=0),
    "more than is ever counted": lambda one: one.update(dropped=10**30),
    "an alert of a list": lambda one: (one.clear(), one.update(ALERT | {"layer": []})),
    "an alert of a number": lambda one: (one.clear(), one.update(ALERT | {"message": 3})),
    "an alert below all layers": lambda one: (one.clear(), one.update(ALERT | {"layer": -1})),
}


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(corpus), out=tmp_path_factory.mktemp("unbroken") / "run", quiet=True).directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_is_none_stops_no_reader(
    unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    number = max(at for at, line in enumerate(lines) if '"kind": "step"' in line)
    record = json.loads(lines[number])
    DAMAGES[damage](record)
    lines[number] = json.dumps(record)
    metrics.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        results = run_results(run)
    assert f"line {number + 1} is damaged and left out" in caplog.text
    assert "run: stopped" in run_page(results)
    assert set(figures(results)) == {"loss", "balance", "load", "speed", "learning_rate", "gradient"}
    assert history(run)["alerts_in_training"] == []
    assert Run(run, {}, interrupted=True).metrics.num_rows == 5
    assert [one.path for one in list_runs(run)] == [run]
    assert resume(run, quiet=True).summary["steps"] == 6


def test_a_number_without_end_hides_no_run(unbroken: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "runs" / "run"))
    (run / "summary.json").write_text('{"steps": 6, "final_validation_loss": 1' + "0" * 400 + "}")
    [found] = list_runs(tmp_path / "runs")
    assert found.loss is not None


def test_points_between_which_a_layer_is_missing_have_the_mean_of_the_others(unbroken: Path) -> None:
    steps = [one for one in read_metrics(unbroken) if one["kind"] == "step"]
    steps[0]["max_vio_per_layer"].pop("0")
    (point,) = thinned(steps, 6)
    assert point["max_vio_per_layer"]["0"] == pytest.approx(sum(s["max_vio_per_layer"]["0"] for s in steps[1:]) / 5)
    del steps[1]["gradient_norm"]
    assert "gradient_norm" in thinned(steps, 6)[0]  # of the last of them
