"""What a run leaves in its directory, and which directories it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.checkpoint.run_state.state import load_model
from finemoe.core.errors import ConfigError, DataError, FinemoeError, RunError
from finemoe.core.files import sole_writer
from finemoe.core.logs import read_json_lines
from finemoe.data import prepare
from finemoe.model.transformer import Transformer
from finemoe.runs import start as start_module
from finemoe.runs.config import read_config, resolve_run
from finemoe.runs.run import Run, resume, train
from finemoe.runs.start import build_method
from finemoe.text import Tokenizer
from runs.tiny_runs import LENGTH, checkpoints, recipe, records, steps


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A DeepSeekMoE run of 6 steps with a validation every 2."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return train(recipe(corpus, training={"evaluate_every": 2}), out=out, quiet=True)


def test_the_directory_holds_all_it_should(finished: Run) -> None:
    assert sorted(path.name for path in finished.directory.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "data.json",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "tokenizer.json",
    ]
    assert [path.name for path in checkpoints(finished.directory)] == [
        "step-00000002",
        "step-00000004",
        "step-00000006",
    ]
    config = read_config(finished.directory / "config.json")
    assert Tokenizer.load(finished.directory).fingerprint() == prepare(config.data).tokenizer.fingerprint()
    assert json.loads((finished.directory / "environment.json").read_text())["packages"]["torch"] == torch.__version__


def test_the_last_step_is_saved_whatever_the_interval(corpus: Path, tmp_path: Path) -> None:
    run = train(recipe(corpus, "dense", training={"steps": 5, "checkpoint_every": 3}), out=tmp_path / "r", quiet=True)
    assert [path.name for path in checkpoints(run.directory)] == ["step-00000003", "step-00000005"]


def test_every_summary_field_is_there_with_its_type(finished: Run) -> None:
    types = {
        "final_validation_loss": float,
        "bits_per_byte": float,
        "final_training_loss": float,
        "max_vio": float,
        "max_vio_per_layer": dict,
        "dead_experts": float,
        "steps": int,
        "tokens": int,
        "seconds": float,
        "checkpoint_stall_seconds": float,
        "tokens_per_second": float,
        "total_parameters": int,
        "active_parameters": int,
        "cache_elements_per_token": int,
        "training_flops": int,
        "peak_memory_bytes": int,
    }
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert summary == finished.summary
    assert {key: type(value) for key, value in summary.items()} == types
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 4 * LENGTH)
    model = load_model(finished.directory)
    assert summary["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < summary["active_parameters"] < summary["total_parameters"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"], rel=0.05)


def test_metrics_have_every_step_and_validation_in_order(finished: Run) -> None:
    order = [(record["kind"], record["step"]) for record in records(finished.directory)]
    validated = [("validation", step) for step in (2, 4, 6)]
    assert order == sorted(
        [*(("step", step) for step in range(1, 7)), *validated], key=lambda item: (item[1], item[0] == "step")
    )
    last = records(finished.directory)[-2]
    assert last["validation_loss"] == finished.summary["final_validation_loss"]
    lines = read_json_lines(finished.directory / "metrics.jsonl")
    assert all(record["seconds"] > 0 for record in lines if record["kind"] != "checkpoint")


def test_load_and_balance_figures_stand_a_recount(finished: Run) -> None:
    assignments = 4 * LENGTH * 7
    for record in steps(finished.directory):
        assert (
            record["load"].keys()
            == record["max_vio_per_layer"].keys()
            == record["dead_experts_per_layer"].keys()
            == {"0", "1"}
        )
        violations, dead = [], []
        for layer, load in record["load"].items():
            assert len(load) == 15
            assert sum(load) == assignments
            mean = assignments / 15
            violations.append((max(load) - mean) / mean)
            dead.append(load.count(0) / 15)
            assert record["max_vio_per_layer"][layer] == pytest.approx(violations[-1], abs=1e-4)
            assert record["dead_experts_per_layer"][layer] == pytest.approx(dead[-1])
        assert record["max_vio"] == pytest.approx(sum(violations) / 2)
        assert record["dead_experts"] == pytest.approx(sum(dead) / 2)
        assert record["terms"]["cross_entropy"] == record["loss"]


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_validation_loss_stands_a_recount_by_the_saved_model(corpus: Path, tmp_path: Path, packing: str) -> None:
    # A capacity under which training drops tokens: validation must not, and its weights are not all 1.
    tables = {"data": {"packing": packing}, "model": {"feed_forward": {"capacity_factor": 0.5}}}
    run = train(recipe(corpus, "deepseek-moe", **tables), out=tmp_path / "run", quiet=True)
    assert all(record["dropped"] > 0 for record in steps(run.directory))
    model = load_model(run.directory)
    data = prepare(read_config(run.directory / "config.json").data)
    total, weight, load = 0.0, 0.0, torch.zeros(15, dtype=torch.int64)
    with torch.no_grad():
        for batch in data.validation_batches(5):
            documents = batch.documents if packing == "isolate" else None
            output = model(batch.tokens, positions=batch.positions, documents=documents)
            logits = model.logits(output.hidden).flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
            total += (losses * batch.weights.flatten()).sum().item()
            weight += batch.weights.sum().item()
            load += output.routing[1].load
    assert total / weight == pytest.approx(run.summary["final_validation_loss"], rel=1e-5)
    assert run.summary["bits_per_byte"] == pytest.approx(
        total / weight / math.log(2) / data.validation_bytes_per_token, rel=1e-5
    )
    validation = [record for record in records(run.directory) if record["kind"] == "validation"][-1]
    assert validation["load"]["1"] == load.tolist()


def test_a_dense_run_has_no_expert_figures(corpus: Path, tmp_path: Path) -> None:
    run = train(recipe(corpus, "dense", training={"steps": 1}), out=tmp_path / "run", quiet=True)
    assert run.summary["max_vio"] is run.summary["dead_experts"] is None
    assert "load" not in steps(run.directory)[0]


def test_the_resolved_configuration_reproduces_the_run(finished: Run, tmp_path: Path) -> None:
    config = read_config(finished.directory / "config.json")
    again = train(config, out=tmp_path / "again", quiet=True)
    assert records(again.directory) == records(finished.directory)


def test_resuming_a_finished_run_changes_nothing(finished: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}
    assert resume(finished.directory, quiet=True).summary == finished.summary
    assert before == {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}


def refused(raw: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> FinemoeError:
    """The error of a run that must end before it reads a corpus, and leaves `out` and its neighbours alone."""

    def work(*_: object) -> None:
        raise AssertionError("work began")

    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    monkeypatch.setattr(start_module, "build", work)
    with pytest.raises(FinemoeError) as caught:
        train(raw, out=out, quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in out.parent.rglob("*")}
    return caught.value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "holds this very run; go on with `finemoe resume"),
        ({"seed": 1}, "holds a run of another configuration (seed: 0 there, 1 here)"),
    ],
)
def test_a_run_is_never_overwritten(
    corpus: Path, finished: Run, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str
) -> None:
    raw = recipe(corpus, training={"evaluate_every": 2}, **change)
    error = refused(raw, finished.directory, monkeypatch)
    assert isinstance(error, RunError)
    assert says in str(error)


def test_a_folder_with_other_things_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "is not empty and not a run" in str(refused(recipe(corpus), tmp_path / "out", monkeypatch))


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_file_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    (tmp_path / "out").write_text("x")
    assert "is a file; choose another --out" in str(refused(recipe(corpus), tmp_path / "out" / below, monkeypatch))


def test_an_unwritable_folder_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_module.os, "access", lambda path, mode: False)  # the tests may run as root
    error = refused(recipe(corpus), tmp_path / "out", monkeypatch)
    assert f"{tmp_path} is not writable; choose another --out" in str(error)


def test_too_little_room_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(start_module.shutil, "disk_usage", lambda path: usage)
    assert "0.00 GiB are free" in str(refused(recipe(corpus), tmp_path / "out", monkeypatch))


def test_room_for_prediction_modules_is_reckoned_with(corpus: Path) -> None:
    config = resolve_run(recipe(corpus, "v3"), "here")
    with torch.device("meta"):
        elements = sum(tensor.numel() for tensor in Transformer(config.model).state_dict().values())
    copies = config.training.keep_checkpoints + 1
    assert start_module.checkpoint_bytes(config) == 12 * elements * copies + (16 << 20)


def test_an_empty_folder_is_fine(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert train(recipe(corpus, training={"steps": 1}), out=tmp_path / "out", quiet=True).summary["steps"] == 1


@pytest.mark.parametrize(
    ("tables", "error", "says"),
    [
        ({"training": {"tokens_per_step": 1000 * LENGTH}}, DataError, "one batch takes 1000"),
        ({"data": {"corpus": {"paths": ["nowhere"]}}}, DataError, "nowhere"),
        ({"training": {"device": "mps"}}, ConfigError, 'training.device = "mps" is not available'),
        ({"training": {"trackers": ["trackio"]}}, ConfigError, "trackio is not installed; pip install"),
    ],
)
def test_what_cannot_work_writes_nothing(
    corpus: Path, tmp_path: Path, tables: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        train(recipe(corpus, **tables), out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_corpus_writes_nothing(corpus: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    raw = recipe(corpus)
    raw["data"]["corpus"] = {"kind": "files", "paths": [str(tmp_path / "empty.txt")]}
    with pytest.raises(DataError):
        train(raw, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(corpus: Path, finished: Run, tmp_path: Path) -> None:
    small = recipe(corpus, data={"tokenizer": str(finished.directory)}, model={"vocab_size": 257})
    del small["data"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"model\.vocab_size 257 is below the tokenizer's 300 ids: set"):
        train(small, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_resume_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run directory \(no config\.json\); `finemoe train"):
        resume(tmp_path, quiet=True)


def test_a_run_without_its_configuration_is_told_where_a_copy_lies(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08}" / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"config\.json is missing; .*step-00000002/config\.json is a copy of it"):
        resume(tmp_path, quiet=True)


def test_same_seed_same_batches_whatever_the_model(corpus: Path) -> None:
    batches = []
    for arm in ("dense", "hash"):
        config = resolve_run(recipe(corpus, arm, seed=7), "recipe")
        batches.append(build_method(config).data.batch(0, 8).tokens)
    assert torch.equal(*batches)


def test_another_seed_reads_the_text_in_another_order(corpus: Path) -> None:
    first, second = (build_method(resolve_run(recipe(corpus, seed=seed), "recipe")).data.batch(0, 8) for seed in (7, 8))
    assert not torch.equal(first.tokens, second.tokens)


def test_a_checkpoint_is_not_resumed_as_a_run(corpus: Path, tmp_path: Path) -> None:
    train(recipe(corpus), out=tmp_path / "run", quiet=True)
    newest = checkpoints(tmp_path / "run")[-1]
    before = sorted(path.name for path in newest.iterdir())
    with pytest.raises(RunError, match="is one checkpoint of a run; give the run's own directory"):
        resume(newest, quiet=True)
    assert sorted(path.name for path in newest.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"optimizer": {"kind": "lion", "learning_rate": 1.0}},
            r"unknown `optimizer\.kind` 'lion'; known: adamw, muon",
        ),
        ({"training": {"steps": 6, "stpes": 1}}, r"unknown key `training\.stpes`, did you mean `steps`\?"),
        ({"method": {"kind": "prefr"}}, r"unknown `method.kind` 'prefr'; known: pretraining, sft"),
        ({"method": "pretraining"}, r'`method` must be a table such as \{ kind = "pretraining" \}'),
    ],
)
def test_an_edited_configuration_is_refused_in_plain_words(
    corpus: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_run({**recipe(corpus), **change}, "recipe")
    train(recipe(corpus), out=tmp_path / "run", quiet=True)
    (tmp_path / "run/summary.json").unlink()
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=says) as caught:
        resume(tmp_path / "run", quiet=True)
    assert "config.json: not the configuration of a run" in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_second_writer_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.core.files._PATIENCE_SECONDS", 0.3)
    out = tmp_path / "run"
    with sole_writer(out), pytest.raises(RunError, match="another process is at work there"):
        train(recipe(corpus), out=out, quiet=True)
    assert sorted(path.name for path in out.iterdir()) == [".lock"]
    assert train(recipe(corpus), out=out, quiet=True).summary["steps"] == 6


def test_a_lost_last_record_is_measured_again(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    expected = train(recipe(corpus), out=out, quiet=True).summary["final_validation_loss"]
    (out / "summary.json").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:4]))
    assert resume(out, quiet=True).summary["final_validation_loss"] == expected


def test_another_model_in_config_json_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(corpus), out=out, quiet=True)
    (out / "summary.json").unlink()
    config = json.loads((out / "config.json").read_text())
    config["model"]["norm_eps"] = 0.5
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"config\.json: model differ from the checkpoint"):
        resume(out, quiet=True)
