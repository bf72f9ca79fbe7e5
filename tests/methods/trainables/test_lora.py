"""LoRA: gradients of both factors against autograd through the sum, what stays, and a resume to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from finemoe.checkpoint.adapters.low_rank import read_low_rank
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.selection import ExpertSelection, LayerSelection, shape_of, write_selection
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.data import DataConfig
from finemoe.data.batch import TokenBatch
from finemoe.methods.setting import Setting
from finemoe.methods.trainables.lora import LoRAConfig, build, share_ranks
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.runs.run import Run, resume, train
from finemoe.training.balancing import BalancingConfig
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import MTPLossConfig, NextToken
from finemoe.training.method import Figures, Method
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.schedule import MultiStepConfig
from finemoe.training.trainer import Plan, Trainer
from oracles.models import VOCAB, small_config, v3_config
from oracles.models import build as drawn
from runs.tiny_runs import assert_same_run, checkpoints, recipe, stop_after, write_corpus

Shares = Mapping[int, tuple[tuple[int, ...], tuple[float, ...]]]


class Rows:
    """Row `i` depends on `i` alone; a third of the weights are 0."""

    @staticmethod
    def batch(position: int, rows: int) -> TokenBatch:
        made = [torch.randint(VOCAB, (13,), generator=torch.Generator().manual_seed(position + i)) for i in range(rows)]
        tokens, place = torch.stack(made), torch.arange(12).expand(rows, 12)
        return TokenBatch(tokens[:, :-1], tokens[:, 1:], (place % 3 > 0).float(), place, torch.zeros_like(place))


def plain() -> Method[TokenBatch]:
    data: Any = Rows()
    return Method(data, NextToken(True), lambda model: Figures({"nothing": 0.0}), before_update=(Clip(1.0),))


def setting_of(config: ModelConfig, start_from: str | None = "the/base") -> Setting:
    balancing = BalancingConfig(rate=0.0)
    return Setting(config, DataConfig(), start_from, 0, 4, None, 1.0, balancing, MTPLossConfig())


def adapted(model: Transformer, micro: int = 4, **options: Any) -> Trainer:
    method = build(LoRAConfig(**options), plain(), setting_of(model.config))
    plan = Plan(5, 4, micro, torch.device("cpu"), bf16=False)
    return Trainer(model, method, AdamWConfig(learning_rate=0.01, weight_decay=0.5), MultiStepConfig(), plan)


def selection_of(path: Path, config: ModelConfig, layers: Shares) -> str:
    made = ExpertSelection(
        source="the/base", router_sha256="0" * 64, model=shape_of(config), score="gate", p=0.5, samples=1, tokens=1,
        trainable_parameters=1, trainable_share=0.5,
        layers=tuple(LayerSelection(layer=n, experts=e, scores=s) for n, (e, s) in layers.items()),
    )  # fmt: skip
    write_selection(path, made)
    return str(path)


def loss_of(model: Transformer, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    batch = Rows.batch(0, 3)
    output = model(batch.tokens) if weights is None else functional_call(model, dict(weights), (batch.tokens,))
    head = model.head_weight if weights is None else weights.get("head.weight", model.head_weight)
    return F.cross_entropy((output.hidden @ head.mT).flatten(0, 1), batch.targets.flatten())


@pytest.mark.parametrize("budget", [None, 5])
def test_gradients_of_both_factors_are_those_of_autograd_through_the_sum(tmp_path: Path, budget: int | None) -> None:
    """W0 + alpha / rank B A, put together expert by expert from what would be saved."""
    model = drawn(small_config()).double()
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    chosen = selection_of(tmp_path / "s.json", model.config, {1: ((4, 0, 3), (0.6, 0.3, 0.1))}) if budget else None
    trainer = adapted(model, rank=3, alpha=6.0, selection=chosen, expert_rank_budget=budget)
    (factors,) = trainer.method.state.values()
    for name, parameter in trainer.parameters.items():
        if name.endswith(".lora_B"):
            parameter.data.normal_()
    trainer.method.after_update[-1](model, {}, 0.0)
    loss_of(model).backward()

    leaves = {
        name: tensor.clone().requires_grad_() for name, tensor in factors.state().tensors.items() if "lora" in name
    }
    tensors = {**factors.state().tensors, **leaves}
    whole = dict(base)
    for one in read_low_rank(tensors):
        delta = torch.zeros_like(base[one.weight])
        for at, expert in enumerate([None] if one.experts is None else one.experts.tolist()):
            a, b = (one.a, one.b) if expert is None else (one.a[at], one.b[at])
            spread = torch.zeros(len(delta) if expert is not None else 1, dtype=torch.float64)
            spread[expert or 0] = 1
            delta = delta + (b @ a if expert is None else spread[:, None, None] * (b @ a)) * (6.0 / a.shape[0])
        whole[one.weight] = whole[one.weight] + delta
    loss_of(model, whole).backward()
    assert leaves.keys() == trainer.parameters.keys()
    ranks = {leaf.shape[-2] for name, leaf in leaves.items() if "experts.down" in name and name.endswith("A")}
    assert ranks == ({3, 2} if budget else {3})
    for name, leaf in leaves.items():
        found, wanted = trainer.parameters[name].grad, leaf.grad
        assert found is not None, name
        assert wanted is not None, name
        assert wanted.any(), name
        assert (found - wanted).norm() <= 1e-10 * wanted.norm(), name
    assert all(p.grad is None for p in model.parameters())


def test_ranks_are_shared_by_largest_remainders() -> None:
    assert share_ranks([0.6, 0.3, 0.1], 5) == [3, 2, 0]  # 3, 1.5 and 0.5: of equal remainders the first
    assert share_ranks([1.0, 1.0, 1.0], 4) == [2, 1, 1]
    assert share_ranks([0.0, 0.0], 3) == [2, 1]
    for budget in range(1, 40):
        assert sum(share_ranks([0.31, 0.27, 0.2, 0.12, 0.1], budget)) == budget


def test_the_model_is_unchanged_before_the_first_update() -> None:
    model, same = drawn(v3_config()), drawn(v3_config())
    trainer = adapted(model)
    trainer.method.after_update[-1](model, {}, 0.0)
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in model.state_dict().items())
    drawn_a = [p for name, p in trainer.parameters.items() if name.endswith("lora_A")]
    assert all(0.9 < p.abs().max() * p.shape[-1] ** 0.5 <= 1 for p in drawn_a if p.numel() > 60)
    again = adapted(same)
    assert all(torch.equal(parameter, again.parameters[name]) for name, parameter in trainer.parameters.items())


def test_frozen_weights_stay_to_the_bit_and_targets_are_the_sum() -> None:
    model = drawn(v3_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = adapted(model, targets=("blocks.1.feed_forward.experts.*", "blocks.*.attention.o_proj.weight"), rank=2)
    trainer.model.train()
    for _ in range(4):
        trainer.step(trainer.micro_batches())
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    stacks = {f"blocks.1.feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert moved == stacks | {f"blocks.{layer}.attention.o_proj.weight" for layer in range(2)}
    (factors,) = trainer.method.state.values()
    for one in read_low_rank(factors.state().tensors):
        whole = before[one.weight].double() + 8.0 * one.b.double() @ one.a.double()
        torch.testing.assert_close(model.state_dict()[one.weight].double(), whole, rtol=1e-6, atol=1e-7)


def test_micro_batches_add_up() -> None:
    once, often = adapted(drawn(small_config()), 4), adapted(drawn(small_config()), 1)
    for trainer in (once, often):
        for name, parameter in trainer.parameters.items():
            if name.endswith(".lora_B"):
                parameter.data.fill_(0.01)
        trainer.step(trainer.micro_batches())
    for name, parameter in once.parameters.items():
        other = often.parameters[name].grad
        assert parameter.grad is not None, name
        assert other is not None, name
        assert parameter.grad.any(), name
        assert (other - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("routers",)}, r"'routers' cannot be adapted: use attention, shared_experts, experts, dense"),
        ({"targets": ("blocks.*",)}, r"'blocks\.\*' matches blocks\.0\.attention_norm\.weight, which is no matrix"),
        ({"targets": ("blocks.*norm.weight",)}, r"which is no matrix"),
        ({"targets": ("*router.weight",)}, r"which is no matrix of attention or of a feed-forward layer"),
        ({"targets": ("layers.0.*",)}, r"'layers\.0\.\*' matches no parameter"),
        ({"targets": ("attention",), "selection": "s.json"}, r"selection is set, and no target is a stack"),
    ],
)
def test_targets_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(LoRAConfig(**options), plain(), setting_of(small_config()))


def test_what_a_model_has_not_is_refused_where_it_is_asked_for() -> None:
    dense = small_config(feed_forward={"kind": "dense", "ffn_hidden_size": 24}, leading=None)
    method = build(LoRAConfig(), plain(), setting_of(dense))
    assert method.select("blocks.0.attention.q_proj.weight")
    assert not method.select("blocks.0.feed_forward.up_proj.weight")
    with pytest.raises(ConfigError, match=r"'experts' matches no parameter"):
        build(LoRAConfig(targets=("attention", "experts")), plain(), setting_of(dense))
    with pytest.raises(ConfigError, match="adapts a trained model: name it as start_from"):
        build(LoRAConfig(), plain(), setting_of(dense, start_from=None))
    with pytest.raises(ValueError, match="shared by relevance"):
        LoRAConfig(expert_rank_budget=8)


def test_what_the_method_freezes_is_not_adapted() -> None:
    frozen = replace(plain(), select=lambda name: None if name.startswith("blocks.0.") else plain().select(name))
    method = build(LoRAConfig(targets=("attention",)), frozen, setting_of(small_config()))
    assert method.select("blocks.1.attention.q_proj.weight")
    assert not method.select("blocks.0.attention.q_proj.weight")


def test_the_note_counts_what_is_trained() -> None:
    model = drawn(small_config())
    trainer = adapted(model)
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    share = count / sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters ({share:.1%} of the model's)" in trainer.method.notes[-1]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A corpus of questions and answers, and a small model to tune."""
    folder = tmp_path_factory.mktemp("lora")
    corpus = write_corpus(folder / "corpus")
    lines = [{"prompt": f"cat {n} dog", "completion": f"fox {n % 7} hen owl"} for n in range(40)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    return folder, train(recipe(corpus), out=folder / "base", quiet=True)


def tuning(first: tuple[Path, Run], **tables: Any) -> dict[str, Any]:
    folder, base = first
    files = {"kind": "files", "paths": [str(folder / "talk.jsonl")], "validation_paths": [str(folder / "held.jsonl")]}
    return {
        "start_from": str(base.directory),
        "method": {"kind": "sft", "samples": 0},
        "trainable": {"kind": "lora", "rank": 2},
        "data": {"corpus": files, "sequence_length": 32, "cache_dir": str(folder / "cache")},
        "training": {"steps": 6, "tokens_per_step": 128, "checkpoint_every": 2, "threads": 1},
        "optimizer": {"learning_rate": 0.01},
        **tables,
    }


def test_resumed_it_is_the_unbroken_run_to_the_bit(
    first: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tuning(first), out=tmp_path / "unbroken", quiet=True)
    stop_after(monkeypatch, 3)
    assert train(tuning(first), out=tmp_path / "broken", quiet=True).interrupted
    assert not resume(tmp_path / "broken", quiet=True).interrupted
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    kept = [load_file(checkpoints(tmp_path / name)[-1] / "method.safetensors") for name in ("unbroken", "broken")]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    base, tuned = (load_model(path).state_dict() for path in (first[1].directory, tmp_path / "broken"))
    moved = {name for name, tensor in tuned.items() if not torch.equal(tensor, base[name])}
    assert moved == {one.weight for one in read_low_rank({k.removeprefix("lora/"): v for k, v in kept[0].items()})}


def test_a_base_that_has_changed_is_refused(
    first: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(first[1].directory, tmp_path / "base")
    stop_after(monkeypatch, 2)
    train({**tuning(first), "start_from": str(base)}, out=tmp_path / "run", quiet=True)
    shutil.rmtree(checkpoints(base)[-1])
    with pytest.raises(CheckpointError, match=rf"start_from {base} does not hold the weights any more"):
        resume(tmp_path / "run", quiet=True)


def test_another_selection_is_refused(first: tuple[Path, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_model(first[1].directory).config
    path = selection_of(tmp_path / "s.json", config, {0: ((3, 1), (0.6, 0.3))})
    table = {"kind": "lora", "targets": ["experts"], "selection": path}
    stop_after(monkeypatch, 2)
    train(tuning(first, trainable=table), out=tmp_path / "run", quiet=True)
    selection_of(tmp_path / "s.json", config, {0: ((3, 2), (0.6, 0.3))})
    with pytest.raises(CheckpointError, match=r"trainable\.selection does not name the experts any more"):
        resume(tmp_path / "run", quiet=True)
