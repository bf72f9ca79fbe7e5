"""Whole comparisons, in miniature: one in real processes, the others with runs made in this one."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.processes import wait_for, write_config
from finemoe.core.config import merge
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import read_json_lines
from finemoe.model.size import measure
from finemoe.runs.config import read_config
from finemoe.runs.start import build_method
from finemoe.studies import compare as compare_module
from finemoe.studies import results as results_module
from finemoe.studies.compare import Comparison, compare
from finemoe.studies.config import resolve_comparison
from runs.tiny_runs import LENGTH, assert_same_run, data_table, records
from studies.in_process import run_here

PER_STEP = 4 * LENGTH


def recipe(corpus: Path, **tables: Any) -> dict[str, Any]:
    """Two arms, two seeds, four steps."""
    return merge(
        {
            "arms": ["dense", "switch"],
            "seeds": [0, 1],
            "base": {
                "vocab_size": 300,
                "hidden_size": 16,
                "num_layers": 1,
                "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8},
                "feed_forward": {"kind": "dense", "ffn_hidden_size": 24},
                "init_std": 0.05,
            },
            "matching": {"total_multiple": 4},
            "budget": {"kind": "tokens", "value": 4 * PER_STEP},
            "data": data_table(corpus),
            "training": {"tokens_per_step": PER_STEP, "evaluate_every": 2, "threads": 1},
            "optimizer": {"learning_rate": 0.01},
            "parallel_runs": 2,
            "prompt": "cat dog",
        },
        tables,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, and no figures or samples, which take longer than the runs."""
    monkeypatch.setattr("finemoe.studies.study.run_fleet", run_here)
    monkeypatch.setattr(compare_module, "write_results", lambda results, directory: None)
    monkeypatch.setattr("finemoe.studies.results._samples", lambda run, tokenizer, prompts: [])


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two arms, two seeds, two processes at a time, everything written."""
    return compare(recipe(corpus), out=tmp_path_factory.mktemp("finished") / "cmp", quiet=True)


def runs(directory: Path) -> list[Path]:
    return sorted((directory / "arms").glob("*/seed-?"))


def stamps(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for run in runs(directory) for path in run.rglob("*")}


def figures(results: dict[str, Any]) -> Any:
    """What a comparison found, without the time it took."""
    timed = ("seconds", "tokens_per_second", "curve", "processor_seconds", "tokens_per_processor_second")
    arms = {name: {k: v for k, v in arm.items() if k not in timed} for name, arm in results["arms"].items()}
    return arms, results["pairs"], results["recipe"], results["complete"]


def test_a_comparison_shows_itself(finished: Comparison) -> None:
    """A notebook shows the table, and a name alone does not print kilobytes."""
    assert len(repr(finished)) < 400
    assert str(finished).splitlines()[0].startswith("Arm")
    html = finished._repr_html_()
    assert html.startswith("<pre")
    assert "Loss" in html
    assert finished.plot().to_dict()["$schema"]
    with pytest.raises(ConfigError, match="did you mean `final_loss`"):
        finished.plot("final_los")


def test_the_directory_holds_runs_and_results(finished: Comparison) -> None:
    assert not finished.interrupted
    names = {path.name for path in finished.directory.iterdir()}
    assert {"compare.json", "arms", "results.json", "results.csv", "report.html", "figures"} <= names
    assert [str(run.relative_to(finished.directory / "arms")) for run in runs(finished.directory)] == [
        "dense/seed-0",
        "dense/seed-1",
        "switch/seed-0",
        "switch/seed-1",
    ]
    assert "<html" in (finished.directory / "report.html").read_text()
    with (finished.directory / "results.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["dense", "switch"]


def test_results_json_has_the_promised_schema(finished: Comparison) -> None:
    results = json.loads((finished.directory / "results.json").read_text())
    assert results == finished.results
    assert results["complete"] is True
    assert list(results["arms"]) == ["dense", "switch"]
    for name, arm in results["arms"].items():
        summaries = [
            json.loads((run / "summary.json").read_text())
            for run in runs(finished.directory)
            if run.parent.name == name
        ]
        loss = arm["validation_loss"]
        assert loss["seeds"] == [summary["final_validation_loss"] for summary in summaries]
        assert loss["low"] < loss["mean"] < loss["high"]
        assert loss["mean"] == pytest.approx(sum(loss["seeds"]) / 2)
        for key in ("total_parameters", "active_parameters", "training_flops", "tokens"):
            assert arm[key] == summaries[0][key]
        assert arm["tokens"] == 4 * PER_STEP
        assert arm["seconds"] > 0
        assert [(point["seed"], point["step"]) for point in arm["curve"]] == [(0, 2), (0, 4), (1, 2), (1, 4)]
        assert [sample["prompt"] for sample in arm["samples"]] == ["cat dog"]
    [pair] = results["pairs"]
    assert (pair["a"], pair["b"]) == ("switch", "dense")
    means = [results["arms"][name]["validation_loss"]["mean"] for name in ("switch", "dense")]
    assert pair["difference"] == pytest.approx(means[0] - means[1])
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["verdict"] in ("better", "worse", "undecided")
    assert results["recipe"]["seeds"] == [0, 1]


def test_speed_is_counted_in_processor_seconds_of_the_steps(finished: Comparison) -> None:
    for arm in finished.results["arms"].values():
        used = {}
        for seed in (0, 1):
            found = read_json_lines(finished.directory / arm["directory"] / f"seed-{seed}" / "metrics.jsonl")
            used[seed] = [record["processor_seconds"] for record in found if record["kind"] == "step"]
        assert arm["processor_seconds"] == pytest.approx(sum(map(sum, used.values())) / 2)
        speeds = [4 * PER_STEP / sum(used[seed]) for seed in (0, 1)]
        assert arm["tokens_per_processor_second"] == pytest.approx(sum(speeds) / 2)
        for point in arm["curve"]:
            assert point["processor_seconds"] == pytest.approx(sum(used[point["seed"]][: point["step"]]))


def test_runs_of_earlier_versions_have_no_processor_seconds(finished: Comparison, tmp_path: Path) -> None:
    old = [{"kind": "step", "step": 1, "processor_seconds": 1.0}, {"kind": "step", "step": 2}]
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    found = results_module._processor(tmp_path, {0: {"tokens": 10}})
    assert found == {"processor_seconds": None, "tokens_per_processor_second": None}


def test_arms_of_a_seed_see_the_same_batches_and_seeds_differ(finished: Comparison) -> None:
    first = {}
    for run in runs(finished.directory):
        config = read_config(run / "config.json")
        batch = build_method(config).data.batch(0, 16)
        first[run.parent.name, run.name] = batch.tokens
    assert torch.equal(first["dense", "seed-0"], first["switch", "seed-0"])
    assert torch.equal(first["dense", "seed-1"], first["switch", "seed-1"])
    assert not torch.equal(first["dense", "seed-0"], first["dense", "seed-1"])


def test_a_second_call_trains_nothing(finished: Comparison, corpus: Path) -> None:
    before = stamps(finished.directory)
    again = compare(recipe(corpus), out=finished.directory, quiet=True)
    assert stamps(finished.directory) == before
    assert figures(again.results) == figures(finished.results)


def test_another_configuration_in_the_same_directory_is_refused(finished: Comparison, corpus: Path) -> None:
    before = stamps(finished.directory)
    with pytest.raises(RunError, match="holds a comparison of another configuration; choose another --out"):
        compare(recipe(corpus, seeds=[0, 1, 2]), out=finished.directory, quiet=True)
    assert stamps(finished.directory) == before


def test_a_folder_with_other_things_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="is not empty and not a comparison"):
        compare(recipe(corpus), out=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_comparison_goes_on_to_the_same_results(
    finished: Comparison, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real Ctrl-C, sent as soon as the first of four runs has finished."""
    raw, out = recipe(corpus), tmp_path / "cmp"
    script = (
        "import json, os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from finemoe import compare\n"
        "from finemoe.studies import results\n"
        "results.figures = lambda results: {}\n"
        "def watch():\n"
        "    while not list(Path(sys.argv[1]).glob('arms/*/*/summary.json')): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "sys.exit(3 if compare(json.loads(sys.argv[2]), out=sys.argv[1], quiet=True).interrupted else 0)\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", script, str(out), json.dumps(merge(raw, {"parallel_runs": 1}))]
    process = subprocess.run(command, env=environment, timeout=120, start_new_session=True, check=False)
    assert process.returncode == 3
    done = [run for run in runs(out) if (run / "summary.json").exists()]
    assert 1 <= len(done) < 4
    partial = json.loads((out / "results.json").read_text())
    assert partial["complete"] is False
    before = {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in done}
    monkeypatch.setattr("finemoe.studies.study.run_fleet", run_here)
    monkeypatch.setattr("finemoe.studies.results.figures", lambda results: {})
    resumed = compare(merge(raw, {"parallel_runs": 1}), out=out, quiet=True)
    assert before == {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in done}
    (arms, pairs, _, complete), (expected_arms, expected_pairs, _, _) = (
        figures(resumed.results),
        figures(finished.results),
    )
    assert complete
    assert (arms, pairs) == (expected_arms, expected_pairs)
    for run, twin in zip(runs(out), runs(finished.directory), strict=True):
        assert_same_run(run, twin)


@pytest.mark.usefixtures("here")
def test_tuning_takes_the_best_rate_of_each_arm_on_a_seed_of_its_own(corpus: Path, tmp_path: Path) -> None:
    tuning = {"learning_rates": [1e-6, 0.01, 1e30], "tokens": 4 * PER_STEP}
    result = compare(recipe(corpus, tuning=tuning, seeds=[0]), out=tmp_path / "cmp", quiet=True)
    trials = result.results["tuning"]["validation_loss"]
    for name, arm in result.results["arms"].items():
        assert arm["learning_rate"] == 0.01
        assert trials[name]["0.01"] < trials[name]["1e-06"]
        assert trials[name]["1e+30"] is None
        seed = read_config(tmp_path / "cmp" / "tuning" / name / "lr-0.01" / "config.json").seed
        assert seed not in (0, 1)
        assert read_config(tmp_path / "cmp" / "arms" / name / "seed-0" / "config.json").optimizer.learning_rate == 0.01


@pytest.mark.usefixtures("here")
def test_a_flops_budget_gives_each_arm_steps_by_its_cost(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus, arms=["dense", "gshard"], seeds=[0])
    config = resolve_comparison(raw, "test")
    costs = {
        name: measure(compare_module.solve(name, config.base, config.matching, config.routing, LENGTH).model, LENGTH)
        for name in config.arms
    }
    value = 7.5 * PER_STEP * costs["dense"].training_flops_per_token
    result = compare(merge(raw, {"budget": {"kind": "flops", "value": value}}), out=tmp_path / "cmp", quiet=True)
    for name, arm in result.results["arms"].items():
        steps = int(value / costs[name].training_flops_per_token / PER_STEP)
        assert arm["tokens"] == steps * PER_STEP
        assert value - costs[name].training_flops_per_token * PER_STEP < arm["training_flops"] <= value
    assert result.results["arms"]["dense"]["tokens"] == 7 * PER_STEP
    assert result.results["arms"]["gshard"]["tokens"] < 7 * PER_STEP


@pytest.mark.usefixtures("here")
def test_a_seconds_budget_gives_each_arm_steps_by_its_measured_speed(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus, budget={"kind": "seconds", "value": 0.03}, seeds=[0])
    result = compare(raw, out=tmp_path / "cmp", quiet=True)
    for name, arm in result.results["arms"].items():
        calibration = json.loads((tmp_path / "cmp" / "calibration" / name / "summary.json").read_text())
        assert arm["tokens"] == max(1, int(0.03 * calibration["tokens_per_second"] / PER_STEP)) * PER_STEP
    before = stamps(tmp_path / "cmp")
    compare(raw, out=tmp_path / "cmp", quiet=True)  # measured once, not again
    assert stamps(tmp_path / "cmp") == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("budget", [{"kind": "tokens", "value": 4 * PER_STEP}, {"kind": "flops", "value": 1e8}])
def test_an_arm_that_fails_is_reported_and_the_others_survive(
    corpus: Path, tmp_path: Path, budget: dict[str, Any]
) -> None:
    raw = recipe(corpus, budget=budget, seeds=[0], learning_rates={"switch": 1e30})
    result = compare(raw, out=tmp_path / "cmp", quiet=True)
    assert list(result.results["arms"]) == ["dense"]
    assert result.results["complete"] is False
    assert result.results["pairs"] == []
    [note] = [note for note in result.results["notes"] if note.startswith("Failed")]
    assert note.startswith("Failed: switch/seed-0: step ")
    assert "is not finite" in note


@pytest.mark.usefixtures("here")
def test_an_arm_that_cannot_be_tuned_or_timed_is_not_run_at_all(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus, tuning={"learning_rates": [1e30], "tokens": 4 * PER_STEP})
    with pytest.raises(RunError, match=r"no run finished; first failure: step .* is not finite"):
        compare(raw, out=tmp_path / "tuned", quiet=True)
    assert not runs(tmp_path / "tuned")
    raw = recipe(corpus, budget={"kind": "seconds", "value": 1}, optimizer={"learning_rate": 1e30})
    with pytest.raises(RunError, match="no run finished"):
        compare(raw, out=tmp_path / "timed", quiet=True)
    assert not runs(tmp_path / "timed")


@pytest.mark.usefixtures("here")
def test_one_seed_has_no_interval_and_decides_nothing(corpus: Path, tmp_path: Path) -> None:
    results = compare(recipe(corpus, seeds=[5]), out=tmp_path / "cmp", quiet=True).results
    assert results["pairs"][0]["verdict"] == "undecided"
    assert results["arms"]["dense"]["validation_loss"]["low"] is None
    assert len(records(tmp_path / "cmp" / "arms" / "dense" / "seed-5")) == 4 + 2


def test_a_base_of_a_few_keys_changes_the_default_one() -> None:
    default, changed = (resolve_comparison(table, "test").base for table in ({}, {"base": {"num_layers": 1}}))
    assert changed == default.model_copy(update={"num_layers": 1})
    assert changed != default


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": ["dense", "dense"]}, "arms must be a list of different entries"),
        ({"seeds": []}, "seeds must be a list of different entries"),
        ({"learning_rates": {"gshard": 0.1}}, "learning_rates names 'gshard', which is not among the arms"),
        ({"training": {"steps": 5}}, r"training\.steps: a comparison's length is \[budget\] kind and value"),
        ({"training": {"max_tokens": 5}}, r"training\.max_tokens: a comparison's length is \[budget\] kind and value"),
        ({"base": {"feed_forward": {"kind": "moe"}}}, "feed_forward"),
        ({"arm": ["dense"]}, "unknown key `arm`, did you mean `arms`?"),
        ({"budget": {"tokens": 5}}, "unknown key `budget.tokens`"),
        ({"arms": ["dense", "gshard-x2"]}, "unknown arm `gshard-x2`, did you mean `gshard-x1.2`?"),
        ({"matching": {"segment": 4}}, "did you mean `segments`?"),
        ({"base": "tiny-dense"}, "`base` must be a table"),
        ({"training": 5}, "`training` must be a table"),
        ({"data": 5}, "`data` must be a table"),
        ({"training": {"tokens_per_step": 50}}, "not a multiple of data.sequence_length"),
        ({"data": {"vocab_size": 999}}, "leave data.vocab_size out"),
        ({"training": {"device": "cuda"}}, "not available here"),
        ({"budget": {"value": 10}}, "less than one step"),
        ({"tuning": {"learning_rates": [0.1, 0.1], "tokens": 640}}, "different rates"),
        (
            {"tuning": {"learning_rates": [0.1, 0.2], "tokens": 640}, "learning_rates": {"dense": 0.1}},
            "exclude each other",
        ),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(
    corpus: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        compare(recipe(corpus, **change), out=tmp_path / "cmp", quiet=True)
    assert not (tmp_path / "cmp").exists()


def test_a_recipe_of_one_model_can_be_an_arm(corpus: Path, tmp_path: Path, here: None) -> None:
    raw = recipe(corpus)
    path = tmp_path / "mine.toml"
    lines = [f"{key} = {value}" for key, value in raw["base"].items() if isinstance(value, int)]
    attention = ", ".join(f"{key} = {value}" for key, value in raw["base"]["attention"].items())
    feed_forward = "kind = 'dense', ffn_hidden_size = 8"
    tables = [f"attention = {{ {attention} }}", f"feed_forward = {{ {feed_forward} }}"]
    path.write_text("\n".join(["[model]", *lines, *tables]))
    comparison = compare(recipe(corpus, arms=["dense", str(path)], seeds=[0]), out=tmp_path / "cmp", quiet=True)
    arm = comparison.results["arms"][str(path)]
    assert (tmp_path / "cmp" / arm["directory"] / "seed-0" / "summary.json").exists()
    assert comparison.results["matching"]["text"][-1] == f"Taken as they are, not sized to the others: {path}."
    path.write_text(path.read_text() + "\n[trainng]\nsteps = 3\n")
    with pytest.raises(ConfigError, match="must hold \\[model\\] only, and holds trainng"):
        compare(recipe(corpus, arms=["dense", str(path)], seeds=[0]), out=tmp_path / "other", quiet=True)


def test_the_command_in_the_results_names_recipe_changes_and_place(tmp_path: Path) -> None:
    command = compare_module._command(Path("my recipe.toml"), ["seeds=[0, 1]"], tmp_path)
    assert shlex.split(command) == [
        *("finemoe", "compare", "my recipe.toml", "--set", "seeds=[0, 1]", "--out", str(tmp_path))
    ]


def test_a_run_whose_study_has_gone_saves_and_ends_by_itself(corpus: Path, tmp_path: Path) -> None:
    raw = {key: value for key, value in recipe(corpus).items() if key in ("data", "optimizer")}
    training = {"steps": 10**6, "tokens_per_step": PER_STEP, "checkpoint_every": 10**6, "evaluate_every": 10**6}
    config = write_config({**raw, "model": recipe(corpus)["base"], "training": training}, tmp_path / "config.json")
    run, command = tmp_path / "run", [sys.executable, "-m", "finemoe.studies.worker"]
    line = f"{shlex.join([*command, str(config), str(tmp_path / 'run')])} $$ & wait"
    with subprocess.Popen(["sh", "-c", line], start_new_session=True, stderr=subprocess.DEVNULL) as study:
        try:
            wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
        finally:
            study.kill()
    wait_for(lambda: any(run.glob("checkpoints/step-*")))  # nothing but the end of the study would have made it
