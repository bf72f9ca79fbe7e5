"""What must not change between two sittings of a run, and what a recipe must not leave moving or still by accident."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.selection import read_selection
from finemoe.core.errors import CheckpointError, ConfigError, FinemoeError
from finemoe.methods.measuring import Sampling
from finemoe.methods.reference import Reference
from finemoe.runs.config import resolve_run
from finemoe.runs.run import resume, train
from finemoe.runs.start import build_method
from finemoe.training.method import Group, Selected
from finemoe.training.optimizers import MuonConfig, build_optimizers
from methods.tiny_talks import adapting, run, select, weights
from runs.tiny_runs import corpus

__all__ = ["corpus"]
_BIAS = "blocks.1.feed_forward.router.selection_bias"


def test_rows_are_not_put_into_other_experts_after_the_selection_changed(base: Path, tmp_path: Path) -> None:
    chosen = select(base, tmp_path / "selection.json", {1: (6, 2)})
    found = run(base, tmp_path / "run", trainable={"kind": "experts", "selection": str(chosen)}, training={"steps": 2})
    select(base, chosen, {1: (2, 6)})
    with pytest.raises(CheckpointError, match=r"trainable.selection does not name the experts any more"):
        resume(found, overrides=["training.steps=4"], quiet=True)
    select(base, chosen, {1: (6, 2)})
    resume(found, overrides=["training.steps=4"], quiet=True)


@pytest.mark.parametrize(
    ("trainable", "moves"),
    [
        ({"freeze": ["blocks.*"]}, False),
        ({"freeze": ["*router*"]}, False),
        ({"freeze": ["blocks.1.*"]}, False),
        ({"freeze": ["*attention*"]}, True),
        ({"kind": "names", "train": ["blocks.*"]}, True),
        ({"kind": "names", "train": ["blocks.0.*"]}, False),
    ],
)
def test_biases_stay_with_routers_however_they_are_named(base: Path, trainable: dict[str, Any], moves: bool) -> None:
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "sft"}, trainable=trainable)
    assert (resolve_run(raw, "recipe").resolved_balancing.rate > 0) is moves


def test_a_frozen_layer_keeps_its_bias(base: Path, tmp_path: Path) -> None:
    found = run(base, tmp_path / "run", trainable={"freeze": ["blocks.*"]}, training={"steps": 2})
    assert torch.equal(weights(base)[_BIAS], weights(found)[_BIAS])


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        ({"freeze": ["*"]}, "trainable.freeze: nothing of the model is left to train: freeze less"),
        ({"kind": "names", "train": ["mtp"]}, 'prediction modules train with method.mtp = "train"'),
    ],
)
def test_a_run_in_which_nothing_would_train_is_refused(
    base: Path, tmp_path: Path, trainable: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(base, tmp_path / "run", trainable=trainable)
    assert said in str(error.value)


def test_a_selection_of_another_model_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = select(base, tmp_path / "selection.json", {1: (6, 2)})
    tables: dict[str, Any] = {"trainable": {"kind": "experts", "selection": str(chosen)}}
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "sft"}, **tables)
    (check,) = build_method(resolve_run(raw, "recipe")).prepare
    model = load_model(base)
    logging.getLogger("finemoe").propagate = True
    with caplog.at_level(logging.WARNING):
        check(model, True)
        assert "whose routers differ" not in caplog.text
        with torch.no_grad():
            model.blocks[1].feed_forward.router.weight.add_(1)
        check(model, False)
        assert "whose routers differ" not in caplog.text
        check(model, True)
    assert "whose routers differ" in caplog.text
    assert read_selection(chosen, model.config).source in caplog.text


def test_chosen_experts_are_stepped_by_muon_as_in_their_stack() -> None:
    """Gate and up lie above each other, and are made orthogonal apart, in rows as in stacks."""
    start, gradient = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    found = []
    for name in ("blocks.1.feed_forward.experts.gate_up_proj", "blocks.1.feed_forward.experts.gate_up_proj.rows"):
        parameter = nn.Parameter(start.clone())

        (muon,) = build_optimizers(MuonConfig(learning_rate=0.1), [Selected(name, parameter, Group())])
        parameter.grad = gradient.clone()
        muon.step()
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_a_reference_is_of_the_tokens_and_not_of_the_templates_name(base: Path) -> None:
    """A template that is edited has its name still, and the texts may be of the same lengths."""
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "dpo"})
    config = resolve_run(raw, "recipe")
    model = load_model(base)
    data: Any = build_method(config).data
    known = Reference(data, config.setting)
    before = known._key(model)
    assert Reference(data, config.setting)._key(model) == before
    stored = data.train.stored
    other = stored.tokens.copy()
    other[1] += 1
    object.__setattr__(stored, "tokens", other)
    assert known._key(model) != before


def test_a_template_that_changed_is_seen_when_a_run_resumes(base: Path, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", training={"steps": 2})  # it has learnt the plain template
    raw = adapting(first, base.parent / "pairs.jsonl", {"kind": "sft"}, training={"steps": 2})
    found = train(raw, out=tmp_path / "second", quiet=True).directory
    for path in first.rglob("chat_template.jinja"):
        path.write_text("Hear! " + path.read_text())
    with pytest.raises(FinemoeError, match="template_sha256"):
        resume(found, overrides=["training.steps=4"], quiet=True)
    assert "template_sha256" in json.loads((found / "data.json").read_text())


def test_samples_have_the_room_that_they_need(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows with the prompts: a fixed one has no room for a long question to a large model."""
    from finemoe.methods import measuring

    given: list[int] = []
    engine = measuring.Engine

    def spy(*args: Any, cache_bytes: int, **rest: Any) -> Any:
        given.append(cache_bytes)
        return engine(*args, cache_bytes=cache_bytes, **rest)

    monkeypatch.setattr(measuring, "Engine", spy)
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": "sft"})
    tokenizer = build_method(resolve_run(raw, "recipe")).data.tokenizer
    model = load_model(base).eval()
    per_token = sum(one.attention.cache_elements_per_token() for one in [*model.config.blocks, *model.config.mtp]) * 4
    for length in (10, 1000):
        assert len(Sampling(tokenizer, ((5,) * length,) * 2, 8)(model)) == 2
        assert given[-1] >= 2 * (length + 8) * per_token
    assert given[0] < given[1] / 10
