"""Different ways to compute the same run land on the same trajectory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finemoe.core.errors import TrainingError
from finemoe.model.config import Kernels
from finemoe.runs import kernels as run_kernels
from finemoe.runs import run as run_module
from finemoe.runs.calibration import Chosen
from finemoe.runs.run import resume, train
from finemoe.training.method import Method
from finemoe.training.optimizers import OPTIMIZERS
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer
from runs.tiny_runs import (
    FEED_FORWARDS,
    LENGTH,
    assert_same_run,
    checkpoints,
    newest_state,
    recipe,
    records,
    steps,
    stop_after,
    write_corpus,
)

ARMS = [*FEED_FORWARDS, "v3"]
ROUTED = ["hash", "gshard", "deepseek-moe", "v3"]


def trained(corpus: Path, out: Path, arm: str, **tables: Any) -> Path:
    return train(recipe(corpus, arm, **tables), out=out, quiet=True).directory


def assert_close_runs(left: Path, right: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms and weights agree up to the order of additions."""
    for a, b in zip(steps(left), steps(right), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=20 * tolerance)
        assert a.get("load") == b.get("load")
    (tensors, _), (others, _) = newest_state(left), newest_state(right)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=3e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("arm", ARMS)
def test_accumulating_single_sequences_is_one_large_batch(corpus: Path, tmp_path: Path, arm: str) -> None:
    size = {"tokens_per_step": 8 * LENGTH}
    whole = trained(corpus, tmp_path / "1x8", arm, training=size)
    pieces = trained(corpus, tmp_path / "8x1", arm, training={**size, "micro_batch_tokens": LENGTH})
    uneven = trained(corpus, tmp_path / "3+3+2", arm, training={**size, "micro_batch_tokens": 3 * LENGTH})
    assert_close_runs(whole, pieces)
    assert_close_runs(whole, uneven)


@pytest.mark.parametrize("arm", ["dense", *ROUTED])
def test_recomputing_changes_no_bit(corpus: Path, tmp_path: Path, arm: str) -> None:
    kept = trained(corpus, tmp_path / "kept", arm)
    recomputed = trained(corpus, tmp_path / "recomputed", arm, kernels={"recompute": True})
    assert_same_run(kept, recomputed)


@pytest.mark.parametrize("kernel", ["sorted_slices", "grouped_mm", "native"])
@pytest.mark.parametrize("arm", ROUTED)
def test_expert_kernels_agree(corpus: Path, tmp_path: Path, arm: str, kernel: str) -> None:
    loop = trained(corpus, tmp_path / "loop", arm, kernels={"experts": "loop", "products": "torch"})
    other = trained(corpus, tmp_path / kernel, arm, kernels={"experts": kernel, "products": "torch"})
    assert_close_runs(loop, other)


@pytest.mark.parametrize("arm", ["dense", "gshard", "v3"])
def test_native_products_agree_with_torchs(corpus: Path, tmp_path: Path, arm: str) -> None:
    torchs = trained(corpus, tmp_path / "torch", arm, kernels={"experts": "loop", "products": "torch"})
    natives = trained(corpus, tmp_path / "native", arm, kernels={"experts": "loop", "products": "native"})
    assert_close_runs(torchs, natives)


@pytest.mark.parametrize("arm", ["gshard", "v3"])
@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_attention_kernels_agree(corpus: Path, tmp_path: Path, packing: str, arm: str) -> None:
    data = {"packing": packing}
    fused = trained(corpus, tmp_path / "sdpa", arm, data=data, kernels={"attention": "sdpa"})
    reference = trained(corpus, tmp_path / "reference", arm, data=data, kernels={"attention": "reference"})
    assert_close_runs(fused, reference)


def test_the_v3_arm_moves_its_biases_and_learns_to_look_ahead(corpus: Path, tmp_path: Path) -> None:
    # What the comparisons above would miss if it silently stood still on both sides.
    run = trained(corpus, tmp_path / "v3", "v3")
    tensors, _ = newest_state(run)
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("selection_bias")}
    assert len(biases) == 3  # one routed layer, two modules
    assert all(bias.any() for bias in biases.values())
    for name in ("mtp_1", "mtp_2"):
        losses = [step["terms"][name] for step in steps(run)]
        assert losses[-1] < losses[0]


def test_isolating_documents_changes_nothing_where_a_row_has_only_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=1, words=600)
    runs = [
        trained(corpus, tmp_path / packing, "gshard", data={"packing": packing})
        for packing in ("concatenate", "isolate")
    ]
    assert_close_runs(*runs)


def test_isolating_documents_matters_where_a_row_has_several(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=60, words=5)
    runs = [
        trained(corpus, tmp_path / packing, "gshard", data={"packing": packing})
        for packing in ("concatenate", "isolate")
    ]
    assert steps(runs[0])[0]["loss"] != pytest.approx(steps(runs[1])[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("arm", ["dense", *ROUTED])
def test_a_run_that_was_stopped_and_resumed_is_the_unbroken_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, stop: int
) -> None:
    unbroken = trained(corpus, tmp_path / "unbroken", arm)
    stop_after(monkeypatch, stop)
    first = train(recipe(corpus, arm), out=tmp_path / "broken", quiet=True)
    assert first.interrupted
    assert first.summary == {}
    assert not (first.directory / "summary.json").exists()
    assert checkpoints(first.directory)[-1].name == f"step-{stop:08d}"
    torch.manual_seed(99)  # the state comes from the checkpoint, not from this process
    assert not resume(first.directory, quiet=True).interrupted
    assert_same_run(unbroken, first.directory)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (unbroken, first.directory)]
    timed = ("seconds", "tokens_per_second", "processor_seconds", "peak_memory_bytes", "checkpoint_stall_seconds")
    same = [{key: value for key, value in summary.items() if key not in timed} for summary in summaries]
    assert same[0] == same[1]


@pytest.mark.parametrize("optimizer", [kind for kind in OPTIMIZERS if kind != "adamw"])
def test_any_optimizer_resumes_to_the_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    table = {"optimizer": {"kind": optimizer}}
    unbroken = trained(corpus, tmp_path / "unbroken", "deepseek-moe", **table)
    stop_after(monkeypatch, 3)
    broken = trained(corpus, tmp_path / "broken", "deepseek-moe", **table)
    resume(broken, quiet=True)
    assert_same_run(unbroken, broken)


def test_what_draws_from_the_default_generator_resumes_where_it_was(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dropout would, or a mask that is drawn anew in each step."""

    def noise(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.01)
        return {"drawn": torch.rand(()).item()}

    original = run_module.build_method

    def noisy(*given: Any) -> Method[Any]:
        method = original(*given)
        return replace(method, before_update=(*method.before_update, noise))

    monkeypatch.setattr(run_module, "build_method", noisy)
    unbroken = trained(corpus, tmp_path / "unbroken", "dense")
    stop_after(monkeypatch, 3)
    broken = trained(corpus, tmp_path / "broken", "dense")
    torch.manual_seed(99)
    resume(broken, quiet=True)
    assert_same_run(unbroken, broken)
    drawn = [step["figures"]["drawn"] for step in steps(unbroken)]
    assert len(set(drawn)) == len(drawn)


def test_stopping_after_every_single_step_still_gives_the_unbroken_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = trained(corpus, tmp_path / "unbroken", "deepseek-moe")
    stop_after(monkeypatch, 1)
    run = train(recipe(corpus), out=tmp_path / "broken", quiet=True)
    for step in range(2, 7):
        stop_after(monkeypatch, step)
        run = resume(run.directory, quiet=True)
    assert not run.interrupted  # a stop after the last step is no interruption
    assert_same_run(unbroken, run.directory)


def test_resuming_before_the_first_checkpoint_starts_over(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = trained(corpus, tmp_path / "unbroken", "gshard")

    def die(trainer: Trainer, *arguments: object) -> StepReport:
        raise TrainingError("before anything")

    with monkeypatch.context() as patched:
        patched.setattr(run_module.Trainer, "step", die)
        with pytest.raises(TrainingError):
            train(recipe(corpus, "gshard"), out=tmp_path / "broken", quiet=True)
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["step-00000000"]
    resume(tmp_path / "broken", quiet=True)
    assert_same_run(unbroken, tmp_path / "broken")
    assert records(tmp_path / "broken")


def test_a_resumed_run_keeps_its_kernels_though_another_would_be_chosen_now(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choosing(name: str) -> None:
        def choose(config: Any, kernels: Kernels, **where: Any) -> Chosen:
            return Chosen(kernels.model_copy(update={"experts": name, "products": "torch"}), "")

        monkeypatch.setattr(run_kernels, "choose", choose)

    choosing("loop")
    straight = trained(corpus, tmp_path / "straight", "deepseek-moe")
    stop_after(monkeypatch, 3)
    broken = trained(corpus, tmp_path / "broken", "deepseek-moe")
    choosing("sorted_slices")
    resume(broken, quiet=True)
    assert_same_run(straight, broken)
    _, state = newest_state(broken)
    assert state["kernels"] == {"experts": "loop", "products": "torch"}
