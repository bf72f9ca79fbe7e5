"""`finemoe show`: finished runs side by side."""

from __future__ import annotations

import json
import shutil
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
    assert "finemoe runs" in result.stderr


def test_runs_in_every_state_stand_side_by_side(
    finished: list[Path], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finemoe show runs/*`: one that goes on, one that has only begun, and a folder of notes."""
    home = finished[0].parent
    config = {"model": {"hidden_size": 16}, "training": {"steps": 20}}
    records = [
        {"kind": "validation", "step": 5, "validation_loss": 4.25, "max_vio": 1.5, "dead_experts": 0.25},
        {"kind": "step", "step": 7, "loss": 4.5, "tokens": 7000, "seconds": 7.0, "tokens_per_second": 1000.0},
    ]
    for name, text in (("half", "".join(json.dumps(record) + "\n" for record in records)), ("begun", "")):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(config))
        (home / name / "metrics.jsonl").write_text(text)
    (home / "half" / "failure.json").write_text(json.dumps({"step": 8, "message": "step 8 is not finite"}))
    (home / "notes").mkdir()
    monkeypatch.chdir(home)
    result = command("show", "begun", "half", "notes", "v3")
    assert result.exit_code == 0, result.stderr
    assert "notes is left out" in result.stderr
    rows = {line[:24].strip(): line[24:].split() for line in result.stdout.splitlines()}
    assert rows["State"] == ["stopped", "failed", "finished"]
    assert rows["Steps"] == ["0", "of", "20", "7", "of", "20", "10"]
    assert rows["Validation loss, nats"] == ["–", "4.2500", "3.2500"]
    shown = json.loads(command("show", "half", "--json").stdout)
    assert (shown[0]["state"], shown[0]["steps"], shown[0]["planned_steps"]) == ("failed", 7, 20)


def test_a_run_that_was_interrupted_shows_its_rewards_and_its_size(
    run_directory: Path, tmp_path: Path, command: Any
) -> None:
    run = tmp_path / "own"
    shutil.copytree(run_directory, run)
    measured = {"kind": "validation", "step": 2, "validation_reward": 0.5, "validation_length": 7.25, "samples": []}
    step = {"kind": "step", "step": 3, "loss": 4e-4, "tokens": 7, "seconds": 7.0, "tokens_per_second": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (measured, step)))
    rows = {line[:24].strip(): line[24:].split() for line in command("show", run).stdout.splitlines()}
    assert rows["State"] == ["stopped"]
    assert rows["Validation reward"] == ["0.5000"]
    assert rows["Validation length"] == ["7.2500"]
    assert rows["Training loss"] == ["–"], "a policy gradient's loss says nothing"
    assert rows["Parameters, total"] != ["–"]
    shown = json.loads(command("show", run, "--json").stdout)[0]
    assert shown["total_parameters"] >= shown["active_parameters"] > 0
    assert "reward 0.500" in command("runs", run).stdout
    (run / "config.json").write_text("{")
    assert "Parameters, total" in command("show", run).stdout


def test_a_comparison_is_known_wherever_a_model_is_asked_for(run_directory: Path, tmp_path: Path, command: Any) -> None:
    home = tmp_path / "demo"
    arm = home / "arms" / "deepseek-moe" / "seed-0"
    shutil.copytree(run_directory, arm)
    (home / "arms" / "dense" / "seed-0").mkdir(parents=True)
    (home / "arms" / "dense" / "seed-0" / "config.json").write_text("{}")  # not begun
    (home / "compare.json").write_text(json.dumps({"name": "demo", "arms": ["deepseek-moe", "dense"], "seeds": [0]}))
    for words in (
        ["generate", home, "-p", "x"],
        ["analyze", "load", home],
        ["analyze", "knockout", home],
        ["analyze", "experts", home / "arms"],
        ["trace", home, "--text", "x", "--out", tmp_path / "trace"],
        ["export", home, tmp_path / "out"],
        ["generate", tmp_path, "-p", "x"],
    ):
        result = command(*words)
        assert result.exit_code == 2, words
        assert f"name one of them: {arm}" in result.stderr.replace("\n", ""), words
    assert "State" in command("show", home).stdout
    assert str(arm) in "".join(command("doctor", home).stdout.split()).replace("\n", "")
    refused = command("resume", home, "--set", "training.steps=9")
    assert (refused.exit_code, "is a comparison" in refused.stderr) == (2, True)


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


@pytest.mark.parametrize(("width", "columns"), [(80, ("Name", "Kind", "Model")), (48, ("Name", "Steps"))])
def test_a_name_in_the_list_of_runs_can_be_copied(
    run_directory: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch, width: int, columns: tuple[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("own-20261129-044827", "a"):
        shutil.copytree(run_directory, Path("runs") / name)
    head, _, *rows = command("runs").stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["a", "own-20261129-044827"]
    assert set(columns) <= set(head.split())
    assert ("Date" in head, "Size" in head, "State" in head) == (False, width == 80, True)
    monkeypatch.setenv("COLUMNS", "120")
    assert "Date" in command("runs").stdout
