"""The page of one run: what it says while it trains, at its end, and of a run that has hardly begun."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.run.figures import balance_chart, figures, load_map, loss_chart
from finemoe.charts.run.page import run_page
from finemoe.charts.run.words import summary
from finemoe.core.errors import RunError
from finemoe.core.files import sole_writer
from finemoe.runs import report
from finemoe.runs.report import run_report, run_results, thinned

SUMMARY = {
    "final_validation_loss": 3.25,
    "tokens": 4000,
    "seconds": 20.0,
    "tokens_per_second": 200.0,
    "steps": 40,
    "total_parameters": 3000,
    "active_parameters": 1000,
}
HOSTILE = "<img src=x onerror=alert(1)>"


def step(number: int, layers: int = 2) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "tokens": 100 * number, "loss": 8.0 - number / 10, "gradient_norm": 0.5,
        "learning_rate": 0.01, "seconds": number / 2, "tokens_per_second": 200.0, "load": {"1": [3, 1]},
        "max_vio_per_layer": {str(layer): 0.5 for layer in range(layers)},
    }  # fmt: skip


def write_run(folder: Path, steps: int = 40, layers: int = 2) -> Path:
    """A run directory of that many steps of 80, with two validations and an alert, no checkpoint."""
    folder.mkdir()
    config = {"name": "small", "training": {"steps": 80, "tokens_per_step": 100}, "model": {"hidden_size": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    found: list[dict[str, Any]] = [step(number, layers) for number in range(1, steps + 1)]
    for number, loss in ((10, 7.25), (20, 7.5)) if steps >= 20 else ():
        found.append({"kind": "validation", "step": number, "tokens": 100 * number, "seconds": number / 2,
                      "validation_loss": loss, "load": {"1": [1, 3]}})  # fmt: skip
    if steps:
        found.append({"kind": "alert", "step": 7, "layer": 1, "level": "warning", "message": f"starving {HOSTILE}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return folder


def text_of(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_a_run_that_trains_says_where_it_stands_and_opens_itself_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with sole_writer(run):
        results = run_results(run, refresh=15)
    assert summary(results) == [
        "Step 40 of 80, 4.00K tokens in 20 s.",
        "Validation loss 7.500 nats per token at step 20; the lowest was 7.250 at 10.",
        "About 20 s of training left at the speed so far.",
        "1 alert about its experts: see below.",
    ]
    page = text_of(run_page(results))
    assert '<meta http-equiv="refresh" content="15">' in page
    assert "small: training" in page
    assert "Step 7: starving" in page
    assert "<img" not in page
    assert "training.tokens_per_step = 100" in page
    assert set(figures(results)) == {"loss", "balance", "load", "speed", "learning_rate", "gradient"}


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    page = text_of(run_page(run_results(run, refresh=15)))
    assert "refresh" not in page.split("<body")[0]
    assert "small: finished" in page
    assert "left at the speed" not in page
    assert "3.2500" in page


def test_a_failure_counts_until_the_run_got_beyond_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for at, word in ((41, "failed"), (30, "stopped")):
        (run / "failure.json").write_text(json.dumps({"step": at, "message": "a loss was not finite"}))
        page = text_of(run_page(run_results(run)))
        assert f"small: {word}" in page
        assert ("It stopped: a loss was not finite" in page) == (word == "failed")
        assert f"finemoe resume {run}" in page


def test_a_run_without_a_step_and_one_that_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=0)
    assert "No step is done yet." in text_of(run_page(run_results(run)))
    (run / "metrics.jsonl").unlink()
    assert figures(run_results(run)) == {}
    with pytest.raises(RunError, match="not a run directory"):
        run_report(tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_a_report_that_can_be_written_again(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    before = sorted(path.name for path in run.iterdir())
    for _ in range(2):
        assert run_report(run, out=out)["kind"] == "run"
    assert {"report.html", "results.json", "figures"} == {path.name for path in out.iterdir()}
    assert (out / "figures" / "loss.png").exists()
    assert sorted(path.name for path in run.iterdir()) == before
    with pytest.raises(RunError, match="choose another --out"):
        run_report(run, out=run)


def test_following_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out, seen = write_run(tmp_path / "run"), tmp_path / "out", []

    def train_on(seconds: float) -> None:
        seen.append('http-equiv="refresh" content="15"' in (out / "report.html").read_text())
        if len(seen) == 2:
            (run / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(report, "_pause", train_on)
    assert run_report(run, out=out, follow=True)["finished"]
    assert seen == [True, True]
    assert "small: finished" in (out / "report.html").read_text()


def test_following_a_run_that_was_stopped_ends_after_a_minute_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, pauses = write_run(tmp_path / "run"), tmp_path / "out", []
    monkeypatch.setattr(report, "_pause", pauses.append)
    assert not run_report(run, out=out, follow=True)["finished"]
    assert pauses == [15] * 4
    assert "small: stopped" in (out / "report.html").read_text()


def test_a_failed_run_that_is_resumed_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "failure.json").write_text(json.dumps({"step": 41, "message": "a loss was not finite"}))
    with sole_writer(run):
        page = text_of(run_page(run_results(run)))
    assert "small: training" in page
    assert "a process trains it" in page


def test_a_recovery_is_no_alert(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "alert", "step": 9, "layer": 1, "level": "recovered", "message": "layer 1 has recovered"}\n'
        )
    assert "1 alert about its experts: see below." in summary(run_results(run))


def test_a_checkpoint_that_cannot_be_opened_costs_the_samples_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        assert run_results(run, samples=2)["samples"] == []
    assert "the page has no samples" in caplog.text


@pytest.mark.parametrize("training", ["[]", '"x"', '{"steps": NaN}', '{"tokens": "many"}'])
def test_a_damaged_configuration_is_told(tmp_path: Path, training: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text(f'{{"name": "x", "training": {training}}}')
    if training == "[]":
        assert run_results(run)["total_steps"] == 0
        return
    with pytest.raises(RunError, match=r"config\.json: damaged: .*each checkpoint of the run holds a copy"):
        run_results(run)


def test_a_followed_run_may_begin_a_little_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def begin(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (write_run(tmp_path / "run") / "summary.json").write_text(json.dumps(SUMMARY))

    monkeypatch.setattr(report, "_pause", begin)
    assert run_report(tmp_path / "run", out=tmp_path / "out", follow=True)["finished"]
    assert pauses == [1, 1, 1]
    with pytest.raises(RunError, match="not a run directory"):
        run_report(tmp_path / "other", out=tmp_path / "out", follow=True)
    assert len(pauses) == 63


def test_points_of_long_runs_are_means() -> None:
    points = thinned([step(number) | {"loss": float(number)} for number in range(1, 8)], 3)
    assert [point["step"] for point in points] == [3, 6, 7]
    assert [point["loss"] for point in points] == [2.0, 5.0, 7.0]


def test_many_layers_are_a_mean_and_a_band_and_layers_count_from_zero(tmp_path: Path) -> None:
    results = run_results(write_run(tmp_path / "run", layers=12))
    assert len(balance_chart(results).to_dict()["layer"]) == 2
    (cells,) = theme.spec(load_map(results))["datasets"].values()
    assert [(row["layer"], row["expert"], row["relative"]) for row in cells] == [(1, 0, 0.5), (1, 1, 1.5)]
    assert results["load_of"] == "over the last validation"
    assert "training 4.000, validation 7.500" in loss_chart(results).to_dict()["description"]
