"""Whole runs of Child-Tuning, in pre-training and in fine-tuning: stopped half way and resumed, they are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finemoe.core.errors import ConfigError
from finemoe.runs import run as run_module
from finemoe.runs.config import resolve_run
from finemoe.runs.run import Run, resume, train
from finemoe.training.trainer import Trainer
from runs.tiny_runs import LENGTH, assert_same_run, checkpoints, corpus, recipe, steps

__all__ = ["corpus"]

CHILDREN: list[dict[str, Any]] = [
    {"mode": "F"},
    {"mode": "F", "granularity": "expert", "masked": "held"},
    {"mode": "D", "fisher_sequences": 6},
    {"mode": "D", "granularity": "row", "fisher": "example", "masked": "held", "fisher_sequences": 3},
]


def names(table: dict[str, Any]) -> str:
    return " ".join(str(value) for value in table.values())


def broken_and_unbroken(raw: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same recipe straight through, and stopped after step 3 and resumed."""
    train(raw, out=folder / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        run = Trainer.run
        patch.setattr(Trainer, "run", lambda trainer: run(trainer, until=3))
        train(raw, out=folder / "broken", quiet=True)
    assert not resume(folder / "broken", quiet=True).interrupted
    return folder / "unbroken", folder / "broken"


@pytest.mark.parametrize("table", CHILDREN, ids=names)
def test_resumed_pretraining_is_the_unbroken_run_to_the_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    raw = recipe(corpus, trainable={"kind": "child", **table})
    unbroken, broken = broken_and_unbroken(raw, tmp_path, monkeypatch)
    assert_same_run(unbroken, broken)
    assert all(0 < record["figures"]["gradients_kept"] < 1 for record in steps(unbroken))
    kept = [load_file(checkpoints(run)[-1] / "method.safetensors") for run in (unbroken, broken)]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    first = load_file(checkpoints(unbroken)[0] / "method.safetensors")
    same = all(torch.equal(tensor, kept[0][name]) for name, tensor in first.items())
    assert same == (table["mode"] == "D")  # what was found before the run stands; a stream goes on


def test_a_resumed_run_takes_its_masks_from_the_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe(corpus, trainable={"kind": "child", "mode": "D"})
    with monkeypatch.context() as patch:
        run = Trainer.run
        patch.setattr(Trainer, "run", lambda trainer: run(trainer, until=3))
        train(raw, out=tmp_path / "run", quiet=True)

    def never(*arguments: Any) -> None:
        raise AssertionError("the pass over the data is made again")

    monkeypatch.setattr("finemoe.methods.trainables.child.squared_gradients", never)
    assert not resume(tmp_path / "run", quiet=True).interrupted


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(recipe(corpus), out=tmp_path_factory.mktemp("base") / "run", quiet=True)


@pytest.fixture(scope="module")
def fine_tuning(corpus: Path, base: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of conversations, without what is trainable."""
    folder = tmp_path_factory.mktemp("conversations")
    words = ("cat", "dog", "hen", "fox")
    for name, count in (("train", 16), ("validation", 3)):
        some = [{"prompt": f"{words[n % 4]} {n}", "completion": words[(n + 1) % 4]} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(one) for one in some))
    paths = {
        f"{key}paths": [str(folder / f"{side}.jsonl")] for key, side in (("", "train"), ("validation_", "validation"))
    }
    raw = recipe(corpus)
    length = 4 * LENGTH
    return {
        "start_from": str(base.directory),
        "method": {"kind": "sft", "samples": 0},
        "data": {"corpus": {"kind": "files", **paths}, "sequence_length": length, "cache_dir": str(folder / "cache")},
        "training": {**raw["training"], "tokens_per_step": 2 * length, "micro_batch_tokens": length},
        "optimizer": {"learning_rate": 0.01},
    }


@pytest.mark.parametrize("table", [CHILDREN[0], CHILDREN[2]], ids=names)
def test_resumed_fine_tuning_is_the_unbroken_run_to_the_bit(
    fine_tuning: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]
) -> None:
    raw = {**fine_tuning, "trainable": {"kind": "child", **table}}
    unbroken, broken = broken_and_unbroken(raw, tmp_path, monkeypatch)
    assert_same_run(unbroken, broken)
    first, *_, last = steps(unbroken)
    assert last["loss"] < first["loss"]


def test_by_expert_biases_are_left_alone_and_refused(corpus: Path) -> None:
    by_expert = {"kind": "child", "mode": "D", "granularity": "expert"}
    with pytest.raises(ConfigError, match="leaves routers as they are"):
        resolve_run(recipe(corpus, "v3", trainable=by_expert), "recipe")
    raw = recipe(corpus, "v3", trainable=by_expert)
    raw.pop("balancing")
    assert resolve_run(raw, "recipe").resolved_balancing.rate == 0


def test_prediction_modules_train_along_but_for_their_routers(corpus: Path) -> None:
    raw = recipe(corpus, "v3", trainable={"kind": "child", "mode": "D", "granularity": "expert"})
    raw.pop("balancing")
    config = resolve_run(raw, "recipe")
    method = run_module.build_method(config)
    trainer, _ = run_module.first_trainer(config, method)
    frozen = {name for name, one in trainer.model.named_parameters() if not one.requires_grad}
    ahead = {name for name in frozen if name.startswith("mtp.")}
    assert ahead
    assert all("router" in name for name in ahead)
    assert not any("router" in name for name in trainer.parameters)


@pytest.mark.parametrize(
    ("table", "note"),
    [
        ({"mode": "F", "share": 0.2}, "F, by parameter: a share of 0.2 of what trains, drawn anew in every step"),
        (
            {"mode": "D", "granularity": "expert"},
            "D, by expert: a share of 0.3 of the routed experts, those with the largest Fisher information; all else "
            "under `blocks.` and every router stay as they are",
        ),
    ],
    ids=["F", "D"],
)
def test_the_notes_of_a_run_say_what_is_kept(corpus: Path, table: dict[str, Any], note: str) -> None:
    raw = recipe(corpus, trainable={"kind": "child", **table})
    method = run_module.build_method(resolve_run(raw, "recipe"))
    assert method.notes[-1] == f"child-tuning {note}"
