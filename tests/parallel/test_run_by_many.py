"""Whole runs by several processes: their folders, and going on by any other number of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.open import load_model
from finemoe.core.config import merge
from finemoe.parallel.world import ROWS_FIGURE
from finemoe.runs import run as running
from parallel.processes import run
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "shard 2": (2, {"shard": 2}),
    "experts 2": (2, {"shard": 2, "expert": 2}),
    "experts 2, shard 4": (4, {"shard": 4, "expert": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
}


def tables(corpus: Path, name: str) -> dict[str, Any]:
    """Six steps, saved at three. Each of two processes passes one micro-batch, and those of a pipeline two."""
    size, parallel = LAYOUTS[name]
    training = {"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 5, "threads": 1, "tokens_per_step": 128}
    training["evaluate_every"] = 3
    training["micro_batch_tokens"] = 32 if size == 4 else 64
    changes = {"training": training, "parallel": parallel, "optimizer": {"learning_rate": 0.004}}
    return merge(recipe(corpus, "v3", training={}), {**changes, "model": {"mtp_depth": 1}})


def train_all(runs: list[tuple[dict[str, Any], Path]]) -> None:
    for raw, out in runs:
        running.train(raw, out=out, quiet=True)


def resume_all(folders: list[tuple[Path, list[str]]]) -> None:
    for folder, overrides in folders:
        running.resume(folder, overrides=overrides, quiet=True)


def by_each_number(
    work: dict[str, Any], function: Callable[[list[Any]], None], layouts: dict[str, tuple[int, Any]] = LAYOUTS
) -> None:
    """Work by the layout that does it, in processes that are started once for each number of them."""
    for size in (1, 2, 4):
        some = [one for name, found in work.items() if layouts[name][0] == size for one in found]
        if size == 1:
            function(some)
        else:
            run(size, function, some, met=False, deadline=150)


def steps(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return found


def of_steps(folder: Path, figure: str = "loss") -> list[float]:
    found = steps(folder)
    assert len(found) == 6
    return [record[figure] for record in found]


STILL = {"optimizer": {"learning_rate": 1e-30}, "training": {"steps": 1, "checkpoint_every": 1}}
"""A step that moves weights by less than rounding, and biases by all of their rate."""
EXPORTED = ("one", "experts 2, shard 4", "pipeline 2")


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run by each layout, and one of a step in which weights stand still by some of them."""
    folder = tmp_path_factory.mktemp("layouts")
    work = {name: [(tables(corpus, name), folder / name)] for name in LAYOUTS}
    for name in EXPORTED:
        work[name].append((merge(tables(corpus, name), STILL), folder / f"{name}, still"))
    by_each_number(work, train_all)
    return folder


def test_every_layout_writes_the_run_of_one_process(runs: Path) -> None:
    expected = of_steps(runs / "one")
    norms = of_steps(runs / "one", "gradient_norm")
    whole = load_file(runs / "one" / "checkpoints" / "step-00000006" / "model.safetensors")
    for name in LAYOUTS:
        assert of_steps(runs / name) == pytest.approx(expected, abs=5e-6), name
        assert of_steps(runs / name, "gradient_norm") == pytest.approx(norms, rel=5e-5), name
        weights = load_file(runs / name / "checkpoints" / "step-00000006" / "model.safetensors")
        assert weights.keys() == whole.keys()
        assert max((weights[key] - whole[key]).abs().max().item() for key in whole) < 1e-4
        assert json.loads((runs / name / "summary.json").read_text())["steps"] == 6
        assert not list((runs / name / "checkpoints").glob(".writing-*"))


def test_the_metrics_of_every_step_say_how_uneven_rows_were(runs: Path) -> None:
    """Complaint 14 of distribution: memory runs out for want of a figure that somebody could have watched."""
    for name in LAYOUTS:
        told = [record.get("figures", {}).get(ROWS_FIGURE) for record in steps(runs / name)]
        if LAYOUTS[name][1].get("expert", 1) == 1:
            assert told == [None] * 6
        else:
            assert all(1 <= figure <= 2 for figure in told), told
            assert max(told) > 1


def test_what_is_exported_is_the_same_by_every_layout_byte_for_byte(runs: Path, tmp_path: Path) -> None:
    """Biases that the step has moved are in it."""
    for name in EXPORTED:
        export_hf(runs / f"{name}, still", tmp_path / name, quiet=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    exported = load_file(tmp_path / "one" / "model.safetensors")
    biases = [one for name, one in exported.items() if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(one.any() for one in biases)
    for name in EXPORTED[1:]:
        found = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert found.keys() == expected.keys()
        assert [file for file in found if found[file] != expected[file]] == [], name


def in_turn() -> dict[str, tuple[str, ...]]:
    """For every layout itself and the one before it: each writes for another, and each reads another's."""
    names = list(LAYOUTS)
    return {name: (name, names[number - 1]) for number, name in enumerate(names)}


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(in_turn(), id="in turn"),
        pytest.param({name: tuple(LAYOUTS) for name in LAYOUTS}, id="all", marks=pytest.mark.slow),
    ],
)
def test_a_run_saved_by_any_layout_goes_on_in_any_other(
    runs: Path, tmp_path: Path, pairs: dict[str, tuple[str, ...]]
) -> None:
    """Complaints 3 and 4 of distribution: the next losses are the unbroken run's, by the same layout to the bit."""
    work: dict[str, list[tuple[Path, list[str]]]] = {}
    for target, sources in pairs.items():
        parallel = LAYOUTS[target][1]
        overrides = [f"parallel.{key}={parallel.get(key, 1)}" for key in ("shard", "expert", "pipeline")]
        work[target] = [(tmp_path / f"{source} to {target}", overrides) for source in sources]
        for source, (copy, _) in zip(sources, work[target], strict=True):
            shutil.copytree(runs / source, copy)
            shutil.rmtree(copy / "checkpoints" / "step-00000006")
            (copy / "summary.json").unlink()
    by_each_number(work, resume_all)
    for target, sources in pairs.items():
        for source, (copy, _) in zip(sources, work[target], strict=True):
            assert of_steps(copy) == pytest.approx(of_steps(runs / source), abs=2e-6), copy.name
            if source == target:
                for file in ("model.safetensors", "optimizer.safetensors"):
                    ours, theirs = (one / "checkpoints" / "step-00000006" / file for one in (copy, runs / source))
                    assert ours.read_bytes() == theirs.read_bytes(), copy.name


@pytest.mark.slow
def test_a_run_goes_on_by_one_layout_after_another(runs: Path, tmp_path: Path) -> None:
    """Complaint 4 of distribution, as a chain: FSDP2, one process under torchrun, experts and FSDP2, plain."""
    expected, folder = of_steps(runs / "shard 2"), runs / "shard 2"
    for step, (name, size) in enumerate([("one", 1), ("experts 2, shard 4", 4), ("one", 0)], start=3):
        copy = tmp_path / f"from {step}"
        shutil.copytree(folder, copy)
        for one in (copy / "checkpoints").glob("step-*"):
            if one.name > f"step-{step:08d}":
                shutil.rmtree(one)
        (copy / "summary.json").unlink()
        sizes = {"shard": 1, "expert": 1, **LAYOUTS[name][1]}
        work = [(copy, ["training.checkpoint_every=1", *(f"parallel.{key}={value}" for key, value in sizes.items())])]
        if size:
            run(size, resume_all, work, met=False, deadline=150)
        else:
            resume_all(work)
        assert of_steps(copy) == pytest.approx(expected, abs=2e-6), copy.name
        assert (copy / "checkpoints" / f"step-{step + 1:08d}").exists()
        folder = copy


def digests(folder: Path) -> dict[str, str]:
    """Of the bytes of every tensor of the newest checkpoint, and of every expert by itself; biases have moved."""
    found: dict[str, str] = {}
    for name, tensor in load_model(folder).state_dict().items():
        parts = tensor if ".experts." in name else [tensor]
        if "bias" not in name:
            found |= {f"{name} {n}": hashlib.sha256(one.numpy().tobytes()).hexdigest() for n, one in enumerate(parts)}
    return found


def test_a_run_begins_and_is_saved_with_the_experts_of_the_file(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Complaints 5 and 6 of distribution: one rank's experts are saved, or those of rank 0 take everybody's place.

    A step that moves nothing by as much as rounding, from a Hugging Face folder, on four processes.
    """
    export_hf(runs / "one", tmp_path / "exported", quiet=True)
    raw = tables(corpus, "experts 2, shard 4")
    raw.pop("model")
    raw["data"].pop("vocab_size")
    raw = merge(raw, {**STILL, "start_from": str(tmp_path / "exported")})
    run(4, train_all, [(raw, tmp_path / "run")], met=False)
    expected = digests(runs / "one")
    assert len({key for key in expected if ".experts." in key}) >= 8
    assert digests(tmp_path / "run") == expected
