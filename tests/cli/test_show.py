"""`finemoe show`: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SUMMARY = {
    "final_validation_loss": 3.25,
    "bits_per_byte": 1.61,
    "final_training_loss": 3.0,
    "max_vio": 1.25,
    "max_vio_per_layer": {"1": 1.0, "10": 1.5},
    "dead_experts": 0.03125,
    "steps": 10,
    "tokens": 2_000_000,
    "seconds": 61.0,
    "tokens_per_second": 9000.0,
    "total_parameters": 1_500_000,
    "active_parameters": 500_000,
    "cache_elements_per_token": 144,
    "training_flops": 6e12,
    "peak_memory_bytes": 300 << 20,
}


@pytest.fixture
def finished(tmp_path: Path) -> list[Path]:
    dense = {**SUMMARY, "final_validation_loss": 3.5, "max_vio": None, "max_vio_per_layer": {}, "dead_experts": None}
    dense.pop("cache_elements_per_token")  # as runs of earlier versions
    for name, summary in (("v3", SUMMARY), ("dense", dense)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    return [tmp_path / "v3", tmp_path / "dense"]


def test_table_has_a_column_for_each_run(finished: list[Path], command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished[0].parent)
    output = command("show", "v3", "dense").stdout
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    assert rows["Validation loss, nats"] == ["3.2500", "3.5000"]
    assert rows["Cache per token, bf16"] == ["288", "B", "-"]
    assert rows["MaxVio, layer 10"][0] == "1.50"
    assert rows["Dead experts"] == ["3.1", "%", "-"]
    assert max(map(len, output.splitlines())) <= 80
    names = list(rows)
    assert names.index("MaxVio, layer 1") < names.index("MaxVio, layer 10") < names.index("Dead experts")


def test_a_run_of_another_method_shows_what_it_measured(
    finished: list[Path], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = ("final_validation_loss", "bits_per_byte", "max_vio", "max_vio_per_layer", "dead_experts")
    other = {key: value for key, value in SUMMARY.items() if key not in measured} | {"final_accuracy": 0.875}
    folder = finished[0].parent / "prefer"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(other))
    monkeypatch.chdir(folder.parent)
    output = command("show", "v3", "prefer").stdout
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines()}
    assert rows["Validation loss, nats"] == ["3.2500", "–"]
    assert rows["Accuracy"] == ["–", "0.8750"]
    assert rows["Dead experts"] == ["3.1", "%", "-"]


def test_json_is_the_summaries(finished: list[Path], command: Any) -> None:
    shown = json.loads(command("show", *finished, "--json").stdout)
    assert [run["directory"] for run in shown] == [str(path) for path in finished]
    assert shown[0]["max_vio_per_layer"] == SUMMARY["max_vio_per_layer"]


def test_what_is_no_finished_run_is_said(tmp_path: Path, command: Any) -> None:
    result = command("show", tmp_path)
    assert (result.exit_code, "not a run directory" in result.stderr) == (2, True)
    (tmp_path / "config.json").write_text("{}")
    assert "finemoe resume" in command("show", tmp_path).stderr


@pytest.mark.parametrize("content", ["{}", "[]", '{"final_validation_loss": "low"}'])
def test_a_summary_that_is_none_is_named(content: str, finished: list[Path], command: Any) -> None:
    (finished[1] / "summary.json").write_text(content)
    result = command("show", *finished)
    assert result.exit_code == 2
    assert f"{finished[1]}/summary.json" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr


def test_a_page_is_of_one_run_and_following_needs_a_place(finished: list[Path], command: Any, tmp_path: Path) -> None:
    run, out = finished[0], tmp_path / "page"
    (run / "config.json").write_text('{"name": "v3"}')
    made = command("show", run, "--out", out)
    assert made.exit_code == 0, made.stderr
    assert f"Open  {out / 'report.html'}" in made.stdout
    assert "v3: finished" in (out / "report.html").read_text()
    for words, said in (((*finished, "--out", out), "2 were given"), ((run, "--follow"), "add --out FOLDER")):
        refused = command("show", *words)
        assert refused.exit_code == 2
        assert said in refused.stderr
