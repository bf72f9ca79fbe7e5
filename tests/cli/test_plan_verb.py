"""`finemoe plan`, `finemoe launch` and `finemoe analyze placement` on a terminal."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import ConfigError
from finemoe.parallel.planner.devices import this_machine
from finemoe.parallel.planner.setup import Setup
from finemoe.runs.config import read_recipe, resolve_run
from finemoe.runs.planning import distribution
from finemoe.runs.planning.advice import options_of
from finemoe.runs.planning.measured import bandwidth, product_flops

MIXTURE = '[model]\npreset = "tiny-moe"\n[model.feed_forward]\nnum_routed_experts = 64\n'
V3 = (
    "plan", "deepseek-v3", "--gpus", "2048", "--device", "h800", "--precision", "fp8", "--tokens", "14.8T",
    "--set", "parallel.pipeline=16", "--set", "parallel.expert=64", "--set", "parallel.schedule=dualpipev",
    "--gather", "step", "--recompute", "--calibration", "tuned",
)  # fmt: skip


def test_a_plan_says_memory_traffic_bubble_time_and_how_sure(command: Any) -> None:
    shown = " ".join(command(*V3).stdout.split())
    for words in ("it fits", "MaxVio 0", "MaxVio 1", "device-hours", "bubble", "dispatch", "fitted on half", "four of"):
        assert words in shown


def test_json_holds_what_is_shown(command: Any) -> None:
    found = json.loads(command(*V3, "--json").stdout)
    assert found["kind"] == "plan"
    assert found["processes"] == 2048
    assert found["memory"]["uneven"]["total"] > found["memory"]["peak"]["total"]
    assert found["step"]["seconds"]["low"] < found["step"]["seconds"]["value"] < found["step"]["seconds"]["high"]
    assert found["device_hours"]["value"] == pytest.approx(14.8e12 / found["tokens_per_second"]["value"] / 3600)
    assert found["v3_run"]["with_factor_hours"] == pytest.approx(2.664e6, rel=1e-3)
    assert found["calibration"]["name"] == "tuned"
    assert found["timeline"]["spans"]


def test_a_layout_that_does_not_fit_ends_with_its_bytes(command: Any) -> None:
    result = command("plan", "deepseek-v3", "--gpus", "64", "--device", "h100")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "GiB, and there are 79.00. In GiB: " in " ".join(result.stderr.split())
    assert "does not fit h100" in " ".join(result.stderr.split())


def test_a_search_ranks_layouts_and_they_can_be_asked_for(command: Any) -> None:
    found = json.loads(command("plan", "deepseek-moe-16b", "--gpus", "64", "--search", "--json").stdout)
    best = found["search"]["ranked"][0]
    assert best["layout"] == found["layout"]
    shown = command("plan", "deepseek-moe-16b", "--gpus", "64", "--search").stdout
    assert f"The first, for train, launch and plan:\n{best['options']}\n" in shown, "on one line, however long"
    words = best["options"].split()
    again = json.loads(command("plan", "deepseek-moe-16b", "--gpus", "64", *words, "--json").stdout)
    assert again["step"]["seconds"]["value"] == pytest.approx(best["seconds"])
    assert again["memory"]["peak"]["total"] == best["memory"]


def test_what_is_to_be_pasted_is_the_whole_layout(command: Any, tmp_path: Path) -> None:
    """Schedule and recomputation too; and a step of less than a second is not 0 s."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"{MIXTURE}[training]\nsteps = 1\ntokens_per_step = 16384\nmicro_batch_tokens = 2048\n")
    wanted = Setup(
        sequences=64, seq_len=256, micro_batch=8, pipeline=2, shard=2, expert=2, schedule="interleaved", virtual=2,
        recompute=True,
    )  # fmt: skip
    words = [*options_of(wanted).split(), "--set", "model.num_layers=4", "--json"]
    again = json.loads(command("plan", recipe, "--gpus", "4", *words).stdout)
    assert again["layout"] == str(wanted) == "pipeline 2 (interleaved x 2), shard 2, expert 2, recompute"
    shown = command("plan", recipe, "--gpus", "4", "--search").stdout
    assert " ms " in shown.partition("Layout")[2].partition("The first")[0]


def test_a_recipe_brings_its_batch_length_and_layout(command: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"{MIXTURE}[data]\nsequence_length = 128\n[kernels]\nrecompute = true\n"
        "[training]\nsteps = 100\ntokens_per_step = 8192\nmicro_batch_tokens = 256\n[parallel]\nexpert = 4\n"
    )
    found = json.loads(command("plan", recipe, "--gpus", "8", "--json").stdout)
    setup = found["setup"]
    assert (setup["seq_len"], setup["micro_batch"], setup["sequences"]) == (128, 2, 64)
    assert (setup["expert"], setup["shard"], setup["recompute"]) == (4, 8, True)
    assert found["tokens"] == 819_200
    changed = ("--set", "parallel.expert=2", "--set", "training.max_tokens=400_000")
    over = json.loads(command("plan", recipe, "--gpus", "8", *changed, "--json").stdout)
    assert (over["setup"]["expert"], over["tokens"]) == (2, 400_000)
    own = json.loads(command("plan", recipe, "--gpus", "8", "--tokens-per-step", "4096", "--json").stdout)
    assert own["setup"]["sequences"] == 32
    assert own["tokens"] == 409_600


def test_what_a_recipe_leaves_out_is_what_the_trainer_takes(command: Any, tmp_path: Path) -> None:
    """8,192 tokens a step and up to 16,384 at once, or a process's whole share: a plan of less would not fit."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"{MIXTURE}[training]\nsteps = 100\n")
    config = resolve_run(*read_recipe(recipe))
    found = json.loads(command("plan", recipe, "--gpus", "2", "--json").stdout)
    setup = found["setup"]
    assert (setup["sequences"], setup["seq_len"]) == (config.sequences_per_step, config.data.sequence_length)
    assert (setup["micro_batch"], found["step"]["micro_batches"]) == (16, 1), "32 sequences, by two"
    large = json.loads(command("plan", recipe, "--gpus", "2", "--tokens-per-step", "262144", "--json").stdout)
    assert (large["setup"]["micro_batch"], large["step"]["micro_batches"]) == (64, 8), "16,384 tokens"
    small = json.loads(
        command("plan", recipe, "--gpus", "2", "--tokens-per-step", "262144", "--micro-batch", "1", "--json").stdout
    )
    assert (small["setup"]["micro_batch"], small["step"]["micro_batches"]) == (1, 512)
    assert large["memory"]["peak"]["activations"] > 30 * small["memory"]["peak"]["activations"]
    shown = " ".join(command("plan", recipe, "--gpus", "2").stdout.partition("it fits")[0].split())
    assert (
        "a batch of 32 sequences of 256 tokens, of which each process takes 16 at once (1 micro-batch a step)" in shown
    )
    bare = json.loads(command("plan", "tiny-moe", "--gpus", "2", "--json").stdout)["setup"]
    assert (bare["sequences"], bare["micro_batch"]) == (16, 1)


def test_a_last_micro_batch_may_be_smaller(command: Any, tmp_path: Path) -> None:
    """As the trainer cuts a share of 9 by 8: what goes by tokens counts 9, and weights are gathered twice."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"{MIXTURE}[training]\nsteps = 1\n[parallel]\nexpert = 2\n")
    of = {
        share: json.loads(
            command(
                "plan", recipe, "--gpus", "2", "--micro-batch", "8", "--tokens-per-step", str(512 * share), "--json"
            ).stdout
        )
        for share in (8, 9, 16)
    }
    parts = {share: one["step"]["parts"] for share, one in of.items()}
    moved = {share: {line["name"]: line["total"] for line in one["exchanges"]} for share, one in of.items()}
    assert parts[9]["products"] == pytest.approx(9 / 8 * parts[8]["products"])
    assert parts[9]["host"] == pytest.approx(2 * parts[8]["host"])
    assert moved[9]["dispatch"] == pytest.approx(9 / 8 * moved[8]["dispatch"])
    assert moved[9]["gather weights of blocks"] == moved[16]["gather weights of blocks"]


ZBV = ("--set", "parallel.schedule=zbv", "--set", "parallel.pipeline=2")


def test_a_plan_offers_what_finemoe_trains_by_and_nothing_else(command: Any) -> None:
    refused = command("plan", "deepseek-moe-16b", "--gpus", "8", *ZBV)
    assert refused.exit_code == 2
    assert 'parallel.schedule = "zbv" with shard x context = 4: it computes gradients' in " ".join(
        refused.stderr.split()
    )
    few = command(
        "plan", "deepseek-moe-16b", "--gpus", "8", "--set", "parallel.pipeline=4", "--tokens-per-step", "8192"
    )
    assert "a step has 1 micro-batch for each rank" in " ".join(few.stderr.split())
    ranked = json.loads(command("plan", "deepseek-moe-16b", "--gpus", "64", "--search", "--json").stdout)["search"]
    assert ranked["impossible"] > 0
    for row in ranked["ranked"]:
        sizes = row["parallel"]
        assert sizes["schedule"] in ("1f1b", "interleaved") or sizes["shard"] == 1


def test_a_search_runs_the_trainers_refusals(command: Any, tmp_path: Path) -> None:
    """Muon needs whole matrices; the pipeline of a whole share at once has one micro-batch, and is none."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'{MIXTURE}[training]\nsteps = 1\n[optimizer]\nkind = "muon"\n')
    found = json.loads(command("plan", recipe, "--gpus", "4", "--search", "--json").stdout)["search"]
    layouts = {(row["parallel"]["pipeline"], row["parallel"]["replicate"]) for row in found["ranked"]}
    assert layouts == {(1, 4)}
    assert all(row["parallel"]["shard"] == 1 for row in found["ranked"])


def test_a_plan_of_others_software_is_marked(command: Any) -> None:
    shown = " ".join(command(*V3).stdout.split())
    assert "finemoe does not train like that. parallel.schedule" in shown
    assert json.loads(command(*V3, "--json").stdout)["refused"].startswith('parallel.schedule = "dualpipev" with shard')
    own = command("plan", "tiny-moe", "--gpus", "2", "--json")
    assert json.loads(own.stdout)["refused"] is None


def test_processes_that_are_planned_do_not_run(command: Any) -> None:
    said = " ".join(command("plan", "tiny-moe", "--gpus", "8", "--set", "parallel.shard=3").stderr.split())
    assert "are 3 processes, and 8 are planned for: --gpus 3, or other sizes, such as --set parallel.shard=8" in said
    assert "running" not in said


STAGED = f"""{MIXTURE}
[[stage]]
name = "base"
[stage.training]
steps = 10
tokens_per_step = 16384
[[stage]]
name = "answers"
start_from = "base"
[stage.sample]
prompts = ["questions.jsonl"]
[[stage]]
name = "zero"
start_from = "base"
[stage.method]
kind = "grpo"
template = "{{prompt}}"
answer_tokens = 20
[[stage.method.rewards]]
kind = "answer"
[stage.data]
corpus = {{ kind = "problems", problem = "running_sum", count = 100 }}
sequence_length = 64
[stage.training]
steps = 3
tokens_per_step = 4096
"""


@pytest.mark.parametrize("form", ["toml", "json"])
def test_a_plan_is_of_one_stage_as_it_will_be(command: Any, tmp_path: Path, form: str) -> None:
    """What stands outside of all stages is no run; what a stage begins with need not be trained yet."""
    recipe = tmp_path / f"r.{form}"
    recipe.write_text(STAGED if form == "toml" else json.dumps(tomllib.loads(STAGED)))

    def planned(*words: str) -> Any:
        return json.loads(command("plan", recipe, "--gpus", "1", *words, "--json").stdout)

    first, last = planned(), planned("--stage", "zero")
    assert first["notes"] == [
        "This is stage 1 of 3, base; the stages are: base, answers, zero. --stage NAME plans another."
    ]
    assert (first["tokens_per_step"], first["tokens"]) == (16384, 163_840)
    assert (last["setup"]["seq_len"], last["tokens_per_step"], last["tokens"]) == (64, 4096, 12_288)
    assert last["parameters"] == first["parameters"]
    assert planned("--stage", "zero", "--seq-len", "128")["setup"]["seq_len"] == 128
    shown = " ".join(command("plan", recipe, "--gpus", "1", "--stage", "zero").stdout.split())
    assert "This is the update of GRPO alone: a step takes longer by the time of writing its answers" in shown
    assert "writes answers and trains nothing" in command("plan", recipe, "--gpus", "1", "--stage", "answers").stderr
    assert "its stages are: base, answers, zero" in command("plan", recipe, "--gpus", "1", "--stage", "none").stderr
    assert "has no stages" in command("plan", "tiny-moe", "--gpus", "1", "--stage", "base").stderr


def test_small_times_are_in_units_that_say_something(command: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"{MIXTURE}[training]\nsteps = 10\n")
    assert "0.00" not in (shown := command("plan", recipe, "--gpus", "2").stdout.partition("Memory")[0])
    assert "device-seconds" in shown
    assert "device-minutes" in command("plan", recipe, "--gpus", "2", "--tokens", "300M").stdout
    assert "device-hours" in command("plan", recipe, "--gpus", "2", "--tokens", "100B").stdout


def test_a_page_with_its_figures(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    assert command(*V3, "--out", out).exit_code == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "2,664K" in page
    assert "fitted on this run itself" in page
    assert {path.name for path in (out / "figures").glob("*.svg")} == {"memory.svg", "step.svg", "timeline.svg"}
    assert json.loads((out / "results.json").read_text())["kind"] == "plan"
    assert command(*V3, "--out", tmp_path).exit_code == 2, "a folder that holds something else"


def test_a_search_on_this_machine_counts_as_a_plan_of_it_does(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = this_machine(product_flops=1e11, memory=1 << 34, bandwidth=1e10, processes=2)
    monkeypatch.setattr(distribution, "here", lambda processes: device)
    words = ("plan", "tiny-moe", "--gpus", "2", "--device", "here")
    best = json.loads(command(*words, "--search", "--json").stdout)["search"]["ranked"][0]
    alone = json.loads(command(*words, *best["options"].split(), "--json").stdout)
    assert alone["step"]["seconds"]["value"] == best["seconds"]
    memory = alone["memory"]
    assert (memory["peak"]["total"], memory["uneven"]["total"]) == (best["memory"], best["memory_uneven"])
    shown = command(*words, "--search").stdout
    assert "tiny-moe on 2 processes here, " in " ".join(shown.split())
    header = next(line for line in shown.splitlines() if line.startswith("Layout"))
    assert header.split() == ["Layout", "Step", "Tokens/s", "MaxVio", "0", "MaxVio", "1"]


def test_this_machine_is_measured(command: Any) -> None:
    found = json.loads(command("plan", "tiny-moe", "--gpus", "1", "--device", "here", "--json").stdout)
    assert found["device"]["family"] == "here"
    assert found["setup"]["precision"] == "fp32"
    assert found["device"]["peak"]["fp32"] > 1e8
    assert product_flops() > 1e8
    assert bandwidth() > 1e7


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "h10"], "did you mean `h100`"),
        (["--precision", "fp4"], "must be fp32, bf16, fp8"),
        (["--gather", "stepp"], "did you mean `step`"),
        (["--tokens", "many"], "write a number above 0"),
        (["--tokens", "-3B"], "write a number above 0"),
        (["--gpus", "0"], "at least one"),
        (["--set", "model.hidden_size=3"], "write all else into a recipe"),
        (["--set", "training.steps=3"], "write all else into a recipe"),
        (["--set", "parallel=3"], "parallel.expert=64"),
        (["--set", "parallel.expart=3"], "expart"),
        (["--set", "parallel.tensor=2"], "is not built"),
        (["--tokens-per-step", "100"], "is not a multiple of data.sequence_length"),
        (["--search", "--set", "parallel.expert=2"], "leave [parallel]"),
        (["--set", "parallel.pipeline=64"], "needs 64 stages of a block or more"),
        (["--device", "a100", "--precision", "fp8"], "has no fp8"),
    ],
)
def test_mistakes_are_told(command: Any, words: list[str], named: str) -> None:
    gpus = [] if "--gpus" in words else ["--gpus", "64"]
    result = command("plan", "tiny-moe", *gpus, *words)
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.split())


def test_a_plan_that_does_not_fit_can_be_had_in_python() -> None:
    found = distribution.plan("deepseek-v3", 8, refuse=False)
    assert not found["memory"]["fits"]
    with pytest.raises(ConfigError, match="does not fit"):
        distribution.plan("deepseek-v3", 8)


def test_launch_prints_a_file_and_nothing_else(command: Any) -> None:
    words = ["tiny.toml", "--nodes", "2", "--gpus-per-node", "8", "--out", "/data/run"]
    script = command("launch", "slurm", *words)
    assert script.exit_code == 0
    assert "tiny.toml is not here, so that it was not checked" in " ".join(script.stderr.split())
    assert script.stdout.startswith("#!/bin/bash\n")
    assert script.stdout.endswith("--continue\n")
    assert "kind: TrainJob" in command("launch", "kubernetes", *words).stdout
    assert command("launch", "slurm", *words, "--device", "h100").exit_code == 2, "no such recipe here"
    refused = command("launch", "ray", *words)
    assert refused.exit_code == 2
    assert "launch ray is not built" in refused.stderr


# ---- placement ----


def load_report(folder: Path, kind: str = "load") -> Path:
    layers = {"1": {"load": [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]}}
    layers["2"] = {"load": [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]}
    folder.mkdir(parents=True, exist_ok=True)
    series = [{"path": "runs/tiny", "name": "tiny", "layers": layers}]
    (folder / "results.json").write_text(json.dumps({"kind": kind, "series": series}))
    return folder


def test_placement_reads_a_recorded_load(command: Any, tmp_path: Path) -> None:
    folder = load_report(tmp_path / "load")
    words = ["--gpus", "8", "--redundant", "4", "--groups", "4", "--nodes", "2"]
    found = json.loads(command("analyze", "placement", folder, *words, "--json").stdout)
    assert found["layers"]["1"]["devices"][:3] == [[5, 6], [5, 7], [8, 4]]
    assert found["after"] < found["before"]
    shown = command("analyze", "placement", folder / "results.json", *words).stdout
    assert "2 experts on each of 8 devices" in " ".join(shown.split())
    assert "Layer 2" in shown


@pytest.mark.parametrize("made", ["nothing", "other", "damaged"])
def test_what_holds_no_load_is_refused(command: Any, tmp_path: Path, made: str) -> None:
    folder = tmp_path / "load"
    if made != "nothing":
        load_report(folder, "knockout")
    if made == "damaged":
        (folder / "results.json").write_text("{")
    result = command("analyze", "placement", folder, "--gpus", "4")
    assert result.exit_code == 2
    assert "finemoe analyze load MODEL --out" in " ".join(result.stderr.split())
