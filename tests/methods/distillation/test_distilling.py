"""Whole runs of the method: nearer to the teacher, the same however a step is cut, the same after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemoe.checkpoint.open import load_model
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import read_json_lines
from finemoe.runs.run import resume, train
from finemoe.training.trainer import Trainer
from methods.distillation.tiny_pairs import LENGTH, distilling, of_documents
from runs.tiny_runs import assert_same_run, checkpoints, recipe, steps, write_corpus

ON = {"policy": "on", "answer_tokens": 12}
WAYS: dict[str, dict[str, Any]] = {
    "beside": {},
    "top_k": {"top_k": 8},
    "reverse": {"divergence": "reverse", "temperature": 2.0, "mix": 0.5},
    "on": ON,
    "on, forward": {**ON, "divergence": "forward"},
}
SOURCES: dict[str, Any] = {"conversations": distilling, "documents": of_documents}


def validated(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(run / "metrics.jsonl") if record["kind"] == "validation"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_it_gets_nearer_to_its_teacher(models: dict[str, Path], tmp_path: Path, way: dict[str, Any]) -> None:
    raw = distilling(models, method=way, training={"steps": 25, "evaluate_every": 1})
    train(raw, out=tmp_path / "run", quiet=True)
    first, *_, last = (record["validation_loss"] for record in validated(tmp_path / "run"))
    assert 0 < last < 0.5 * first


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("name", ["beside", "top_k"])
def test_what_it_measures(models: dict[str, Path], tmp_path: Path, name: str, source: Any) -> None:
    ran = train(source(models, method=WAYS[name]), out=tmp_path / "run", quiet=True)
    assert {"final_validation_loss", "final_validation_agreement", "final_validation_cross_entropy"} <= set(ran.summary)
    assert all("cross_entropy" not in step["terms"] for step in steps(tmp_path / "run"))  # it counts nothing


def test_a_mixture_learns_from_a_dense_model(models: dict[str, Path], tmp_path: Path) -> None:
    raw = distilling(models, "teacher", method={"teacher": str(models["student"])}, training={"steps": 20})
    train({**raw, "training": {**raw["training"], "evaluate_every": 1}}, out=tmp_path / "run", quiet=True)
    first, *_, last = validated(tmp_path / "run")
    assert last["validation_loss"] < 0.5 * first["validation_loss"]
    assert "max_vio" in last
    assert steps(tmp_path / "run")[0]["terms"]["expert"] > 0  # the router is balanced all the same


@pytest.mark.parametrize("way", [{}, {"divergence": "reverse"}, ON], ids=["forward", "reverse", "on"])
def test_of_a_teacher_that_is_the_student_nothing_is_to_be_learnt(
    models: dict[str, Path], tmp_path: Path, way: dict[str, Any]
) -> None:
    raw = distilling(models, method={**way, "teacher": str(models["student"])}, optimizer={"weight_decay": 0.0})
    train(raw, out=tmp_path / "run", quiet=True)
    for step in steps(tmp_path / "run"):
        assert step["loss"] == step["gradient_norm"] == 0
        assert step["terms"]["agreement"] == pytest.approx(1)
    before = load_model(models["student"]).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_model(tmp_path / "run").state_dict().items())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_step_may_be_cut(models: dict[str, Path], tmp_path: Path, way: dict[str, Any]) -> None:
    """One batch of four, and four of one, on a mixture whose balance is counted by conversation."""
    for name, tokens in {"whole": 4 * LENGTH, "cut": LENGTH}.items():
        raw = distilling(models, "teacher", training={"micro_batch_tokens": tokens, "steps": 2}, method=way)
        raw["method"]["teacher"] = str(models["student"])
        train(raw, out=tmp_path / name, quiet=True)
    for one, other in zip(*(steps(tmp_path / name) for name in ("whole", "cut")), strict=True):
        assert one["terms"] == pytest.approx(other["terms"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (distilling, "beside"),
        (distilling, "top_k"),
        (distilling, "on"),
        (of_documents, "beside"),
        (of_documents, "top_k"),
    ],
)
def test_resumed_it_is_the_unbroken_run_to_the_bit(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: Any
) -> None:
    raw = source(models, method=WAYS[name])
    train(raw, out=tmp_path / "unbroken", quiet=True)
    stepping = Trainer.step

    def stopping(self: Trainer, *arguments: Any) -> Any:
        report = stepping(self, *arguments)
        if report.step == 3:
            self.request_stop()
        return report

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", stopping)
        assert train(raw, out=tmp_path / "broken", quiet=True).interrupted
    assert len(steps(tmp_path / "broken")) == 3
    assert not resume(tmp_path / "broken", quiet=True).interrupted
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_run_does_not_go_on_with_another_teacher(models: dict[str, Path], tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(models["teacher"], teacher)
    train(distilling(models, method={"teacher": str(teacher)}), out=tmp_path / "run", quiet=True)
    assert "teacher_sha256" in json.loads((tmp_path / "run" / "data.json").read_text())
    (tmp_path / "run" / "summary.json").unlink()
    for checkpoint in checkpoints(teacher)[1:]:
        shutil.rmtree(checkpoint)
    with pytest.raises(RunError, match="teacher_sha256"):
        resume(tmp_path / "run", quiet=True)


def test_a_teacher_of_another_tokenizer_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    other = train(recipe(write_corpus(tmp_path / "corpus", seed=9)), out=tmp_path / "other", quiet=True)
    raw = distilling(models, method={"teacher": str(other.directory)})
    with pytest.raises(ConfigError, match=r"method\.teacher .* has another tokenizer .*finemoe sample"):
        train(raw, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_padded_matrices_are_compared_as_far_as_both_go(models: dict[str, Path], tmp_path: Path) -> None:
    raw = of_documents(models, training={"steps": 20, "evaluate_every": 1})
    raw.pop("start_from")
    raw["model"] = {**recipe(models["corpus"], "dense")["model"], "vocab_size": 320}
    raw["data"]["tokenizer"] = str(models["teacher"])
    train(raw, out=tmp_path / "run", quiet=True)
    first, *_, last = validated(tmp_path / "run")
    assert last["validation_loss"] < 0.8 * first["validation_loss"]
    weights = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert weights["embedding.weight"].shape[0] == 320


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"policy": "on", "data_kind": "documents"}, "documents ask nothing"),
        ({"policy": "on", "top_k": 4}, "leave top_k out"),
        ({"policy": "on", "mix": 0.5}, "does not read"),
        ({"answer_tokens": 12}, "answer_tokens"),
        ({"too_long": "drop", "data_kind": "documents"}, "too_long"),
        ({"top_k": 4, "divergence": "reverse"}, "whole distribution"),
        ({"top_k": 300}, "not below the 300 ids"),
        ({"policy": "on", "answer_tokens": LENGTH}, "no room for a prompt"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    models: dict[str, Path], tmp_path: Path, way: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(distilling(models, method=way), out=tmp_path / "run", quiet=True)
