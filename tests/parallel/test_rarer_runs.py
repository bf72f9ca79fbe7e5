"""Whole checkpoints by layouts that other tests leave out: gone on with by each itself, by one process, from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.core.config import merge
from parallel.test_run_by_many import STILL, by_each_number, of_steps, resume_all, steps, train_all
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "replicate 2": (2, {"replicate": 2}),
    "replicate 2, shard 2": (4, {"replicate": 2, "shard": 2}),
    "context 2": (2, {"context": 2, "shard": 1}),
    "interleaved": (2, {"pipeline": 2, "schedule": "interleaved"}),
    "zbv": (2, {"pipeline": 2, "schedule": "zbv"}),
    "dualpipev": (2, {"pipeline": 2, "schedule": "dualpipev"}),
}
MANY = [name for name in LAYOUTS if name != "one"]


def tables(corpus: Path, name: str) -> dict[str, Any]:
    """Six steps, saved at three, of four layers, which four stages can share, and without look-ahead."""
    training = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 5, "threads": 1, "tokens_per_step": 128}
    training |= {"evaluate_every": 3, "micro_batch_tokens": 16 if "pipeline" in LAYOUTS[name][1] else 32}
    changes = {"training": training, "parallel": LAYOUTS[name][1], "optimizer": {"learning_rate": 0.004}}
    return merge(recipe(corpus, "v3", training={}), {**changes, "model": {"mtp_depth": 0, "num_layers": 4}})


def settings(name: str) -> list[str]:
    """What a run by any other layout is gone on with by this one."""
    sizes = {"replicate": 1, "shard": 1, "expert": 1, "pipeline": 1, "context": 1, "schedule": "1f1b"}
    micro = tables(Path(), name)["training"]["micro_batch_tokens"]
    return [
        *(f"parallel.{key}={value}" for key, value in (sizes | LAYOUTS[name][1]).items()),
        f"training.micro_batch_tokens={micro}",
    ]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run by each layout, and a step in which weights stand still."""
    folder = tmp_path_factory.mktemp("rarer")
    raws = {name: tables(corpus, name) for name in LAYOUTS}
    work = {name: [(raw, folder / name), (merge(raw, STILL), folder / f"{name}, still")] for name, raw in raws.items()}
    by_each_number(work, train_all, LAYOUTS)
    return folder


def test_each_writes_the_run_of_one_process(runs: Path) -> None:
    norms = [record["gradient_norm"] for record in steps(runs / "one")]
    whole = load_file(runs / "one" / "checkpoints" / "step-00000006" / "model.safetensors")
    for name in MANY:
        assert of_steps(runs / name) == pytest.approx(of_steps(runs / "one"), abs=5e-6), name
        assert [record["gradient_norm"] for record in steps(runs / name)] == pytest.approx(norms, rel=5e-5), name
        weights = load_file(runs / name / "checkpoints" / "step-00000006" / "model.safetensors")
        assert weights.keys() == whole.keys()
        assert max((weights[key] - whole[key]).abs().max().item() for key in whole) < 1e-4, name


def test_each_exports_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    for name in LAYOUTS:
        export_hf(runs / f"{name}, still", tmp_path / name, quiet=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for name in MANY:
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == expected, name


def test_each_goes_on_by_itself_to_the_bit_and_from_one_process_and_to_one(runs: Path, tmp_path: Path) -> None:
    pairs = [(source, target) for name in MANY for source, target in ((name, name), (name, "one"), ("one", name))]
    work: dict[str, list[tuple[Path, list[str]]]] = {name: [] for name in LAYOUTS}
    for source, target in pairs:
        copy = tmp_path / f"{source} to {target}"
        shutil.copytree(runs / source, copy)
        shutil.rmtree(copy / "checkpoints" / "step-00000006")
        (copy / "summary.json").unlink()
        work[target].append((copy, settings(target)))
    by_each_number(work, resume_all, LAYOUTS)
    for source, target in pairs:
        copy = tmp_path / f"{source} to {target}"
        assert of_steps(copy) == pytest.approx(of_steps(runs / source), abs=2e-6), copy.name
        if source == target:
            for file in ("model.safetensors", "optimizer.safetensors"):
                ours, theirs = (one / "checkpoints" / "step-00000006" / file for one in (copy, runs / source))
                assert ours.read_bytes() == theirs.read_bytes(), copy.name
