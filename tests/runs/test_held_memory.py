"""The memory check counts the tensors that a run really holds, whatever its method and whatever may move."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finemoe.checkpoint.weights.shapes import parameter_shapes
from finemoe.core import memory
from finemoe.core.config import merge
from finemoe.core.errors import RunError
from finemoe.methods.distillation import method as distillation
from finemoe.methods.trainables import fisher
from finemoe.parallel.world import SOLO
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.runs.footprint import Footprint, footprint, require_memory
from finemoe.runs.kernels import kernels_for
from finemoe.runs.run import _trainer
from finemoe.runs.start import build_method
from methods.tiny_adaptations import begin_all, of_kinds
from methods.tiny_talks import LENGTH, begin
from runs.tiny_runs import corpus

__all__ = ["corpus"]
WITHIN = 0.02
"""Of what is held; what is not counted are selection biases, numbers of steps, and a number for every answer."""


def storages() -> dict[int, int]:
    """Bytes by address of all tensors that there are."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type == "cpu":
            held = [one, one.grad] if one.is_leaf and one.grad is not None else [one]
            found |= {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in held}
    return found


def since(before: Mapping[int, int]) -> int:
    """[bytes] Of the tensors that were not there before."""
    return sum(nbytes for place, nbytes in storages().items() if place not in before)


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that what is not counted is little."""
    return begin_all(corpus, tmp_path_factory.mktemp("held"), model={"hidden_size": 128})


def config_of(base: Path, method: str, moving: str, tables: Mapping[str, Any]) -> RunConfig:
    return resolve_run(merge(of_kinds(base, method, moving), tables), "test")


def held_in_a_step(config: RunConfig) -> int:
    """[bytes] Of what a run holds when its second step has all gradients, and has let go what they were made of."""
    before = storages()
    method, found = build_method(config), []

    def spy(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        found.append(since(before))
        return {}

    method = replace(method, before_update=(*method.before_update, spy))
    trainer = _trainer(config, method, Path("x"), kernels_for(config).kernels, None, SOLO)
    for _ in range(2):
        trainer.step(trainer.micro_batches())
    return found[-1]


def counted(found: Footprint) -> int:
    """[bytes] What stays through a step."""
    return found.weights + found.gradients + found.optimizer + sum(one.nbytes for one in found.kept)


def passing(config: RunConfig) -> int:
    """[bytes] Of the gradient that is gone before the update."""
    shapes = {name: one for name, one in parameter_shapes(config.model).items() if config.method.moves(name)}
    return 4 * config.trainable.held(shapes, config.setting).passing


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "everything": ("sft", "everything", {}),
    "prediction modules too": ("sft", "everything", {"method": {"mtp": "train"}}),
    "names": ("dpo", "names", {}),
    "experts": ("sft", "experts", {}),
    "lora": ("dpo", "lora", {}),
    "lora on chosen experts": ("sft", "lora", {"trainable": {"targets": ["experts"]}}),
    "child, rows": ("reward", "child", {}),
    "child, weights": ("sft", "child", {"trainable": {"granularity": "parameter"}}),
    "child, held": ("sft", "child", {"trainable": {"granularity": "parameter", "masked": "held"}}),
    "child, experts": ("sft", "child", {"trainable": {"granularity": "expert", "masked": "held"}}),
    "child, drawn and held": ("sft", "child", {"trainable": {"mode": "F", "masked": "held"}}),
    "muon": ("sft", "everything", {"optimizer": {"kind": "muon"}}),
    "teacher on disk": ("distill", "everything", {}),
    "teacher beside": ("distill", "lora", {"method": {"top_k": None}}),
}


SLOW = (
    "prediction modules too",
    "experts",
    "lora on chosen experts",
    "child, rows",
    "child, weights",
    "child, experts",
    "child, drawn and held",
    "names",
    "teacher beside",
)
"""Of which others hold the parts."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS])
def test_what_is_counted_is_what_is_held(base: Path, kind: str) -> None:
    method, moving, tables = KINDS[kind]
    if kind == "lora on chosen experts":
        tables = {"trainable": {**tables["trainable"], "selection": str(base.parent / "selection.json")}}
    config = config_of(base, method, moving, tables)
    found, held = footprint(config), held_in_a_step(config)
    assert held == pytest.approx(counted(found) - passing(config), rel=WITHIN)


def test_fisher_information_is_counted_with_the_gradients_that_it_is_made_of(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(base, "sft", "child", {"trainable": {"granularity": "parameter"}})
    before, heights, original = storages(), [], fisher._backward

    def spy(*arguments: Any) -> bool:
        done = original(*arguments)
        heights.append(since(before))
        return done

    monkeypatch.setattr(fisher, "_backward", spy)
    method = build_method(config)
    _trainer(config, method, Path("x"), kernels_for(config).kernels, None, SOLO)
    found = footprint(config)
    [only] = found.only_before
    assert max(heights) == pytest.approx(found.weights + only.nbytes, rel=WITHIN)
    assert found.before > found.weights + only.nbytes + sum(one.nbytes for one in found.kept)


def test_a_teacher_that_is_recorded_is_counted_for_as_long_as_it_is_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(base, "distill", "everything", {"method": {"teacher": str(base)}})
    before, heights, original = storages(), [], distillation.record

    def spy(*arguments: Any) -> Any:
        heights.append(since(before))
        return original(*arguments)

    monkeypatch.setattr(distillation, "record", spy)
    build_method(config)
    found = footprint(config)
    [only] = found.only_before
    assert heights == [pytest.approx(only.nbytes, rel=WITHIN)]
    assert found.before > only.nbytes
    assert not found.kept


def refusal(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> str:
    """What is said where one byte is missing; with that byte the run may start."""
    needed = footprint(config).needed
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    require_memory(config, torch.device("cpu"), bf16=False)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(RunError) as found:
        require_memory(config, torch.device("cpu"), bf16=False)
    return str(found.value)


def test_a_teacher_beside_is_named_with_what_to_do_about_it(
    corpus: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = footprint(config_of(base, "sft", "everything", {}))
    large = begin(corpus, base.parent / "large", "dense", model={"hidden_size": 4096})
    config = config_of(base, "distill", "everything", {"method": {"teacher": str(large), "top_k": None}})
    assert footprint(config).needed > alone.needed + 4 * 300 * 4096
    said = refusal(monkeypatch, config)
    assert re.search(r"optimizer 0\.00, the teacher 0\.\d\d, activations", said)
    assert "method.top_k = 64, for which the teacher is asked before and not held" in said


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("lora", "the low-rank factors 0.00, what they are added to, a second time 0.00"),
        ("experts", "the experts that move, a second time 0.00"),
        ("child, held", "masks 0.00, weights to be put back 0.00"),
    ],
)
def test_copies_are_named(base: Path, monkeypatch: pytest.MonkeyPatch, kind: str, named: str) -> None:
    assert f"optimizer 0.00, {named}, activations" in refusal(monkeypatch, config_of(base, *KINDS[kind]))


def test_what_is_done_before_the_first_step_may_be_what_does_not_fit(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of single sequences whose Fisher information is read from many at once."""
    tables = {"training": {"tokens_per_step": 64 * LENGTH, "micro_batch_tokens": LENGTH}}
    config = config_of(base, "sft", "child", merge(tables, {"data": {"max_validation_tokens": LENGTH}}))
    said = refusal(monkeypatch, config)
    assert "before its first step, with gradients and Fisher information 0.00" in said
    assert 'Try trainable.mode = "F"' in said
    drawn = config_of(base, "sft", "child", merge(tables, {"trainable": {"mode": "F"}}))
    assert footprint(drawn).needed < footprint(config).needed
