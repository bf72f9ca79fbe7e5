"""Adapters on disk: PEFT's layout element by element, deltas bit by bit, and what a merge makes of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.adapters.tuned_runs import base_of, logits, select, tune
from finemoe.checkpoint.adapters.files import export_adapter, merge
from finemoe.checkpoint.adapters.low_rank import LowRank
from finemoe.checkpoint.adapters.peft import from_peft, to_peft
from finemoe.checkpoint.adapters.tuned import Base
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.families import FAMILIES
from finemoe.checkpoint.open import load_model, load_tokenizer
from finemoe.core.errors import CheckpointError, ConfigError

HF = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    """Of a DeepSeek-V3 in miniature, all three parts."""
    return tune(folder, "v3", "lora", kind="lora", rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def uneven(folder: Path) -> Path:
    """Ranks 5, 3 and 1 of three experts a layer, and of attention 2."""
    path = select(folder / "selection.json", load_model(base_of(folder, "v3")).config)
    table: dict[str, Any] = {"targets": ["experts", "attention"], "rank": 2, "selection": path, "expert_rank_budget": 9}
    return tune(folder, "v3", "uneven", kind="lora", **table)


@pytest.fixture(scope="module")
def esft(folder: Path) -> Path:
    path = select(folder / "selection.json", load_model(base_of(folder, "v3")).config)
    return tune(folder, "v3", "esft", kind="experts", selection=path)


def same(left: Path, right: Path) -> None:
    one, other = load_model(left).state_dict(), load_model(right).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def changes(base: Path, tuned: Path) -> dict[str, Tensor]:
    """What tuning added, by our names, and only where it added anything."""
    one, other = load_model(base).state_dict(), load_model(tuned).state_dict()
    return {name: other[name] - tensor for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.mark.parametrize("name", ["lora", "uneven"])
def test_peft_layout(name: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every element of every delta, with the loops that PEFT's layout means."""
    run = request.getfixturevalue(name)
    found = export_adapter(run, tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert (found["format"], found["family"], found["tensors"]) == ("peft", "deepseek_v3", len(tensors))
    assert raw["peft_version"] == "0.21.2"
    assert raw["lora_dropout"] == 0
    rank, scale = raw["r"], raw["lora_alpha"] / raw["r"]
    assert rank == (3 if name == "lora" else 5)
    wanted = {key: one for key, one in changes(base_of(folder, "v3"), run).items() if not key.startswith("mtp")}
    seen = set()
    stacks = [(n, *pair) for n in (0, 1) for pair in (("gate_up_proj", ".base_layer"), ("down_proj", ""))]
    for layer, stack, inner in stacks:
        ours = f"blocks.{layer}.feed_forward.experts.{stack}"
        if ours not in wanted:
            continue
        a, b = (tensors[f"{HF}.{layer}.mlp.experts{inner}.lora_{x}.weight"] for x in "AB")
        experts = len(wanted[ours])
        for e in range(experts):
            rows = torch.stack([a[e * rank + i] for i in range(rank)])
            columns = torch.stack([b[:, i * experts + e] for i in range(rank)], dim=1)
            torch.testing.assert_close(scale * columns @ rows, wanted[ours][e], rtol=0, atol=1e-6)
        seen.add(ours)
        assert f"model.layers.{layer}.mlp.experts.{stack}" in raw["target_parameters"]
    theirs = {p.ours: p.theirs for p in FAMILIES["deepseek_v3"].placements(load_model(run).config) if not p.index}
    for ours in wanted.keys() - seen:
        module = theirs[ours].removesuffix(".weight")
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(scale * b @ a, wanted[ours], rtol=0, atol=1e-6)
        assert module in raw["target_modules"] or f"{module}.weight" in raw["target_parameters"]
    assert 2 * len(wanted) == len(tensors)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["lora", "uneven", "esft"])
def test_merged_it_is_the_tuned_model(name: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bit for bit where nothing was filled up; prediction modules are no part of PEFT's file, and stay as they were."""
    run, base = request.getfixturevalue(name), base_of(folder, "v3")
    export_adapter(run, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged", quiet=True)
    merged, tuned, before = (load_model(path).state_dict() for path in (tmp_path / "merged", run, base))
    for key, tensor in merged.items():
        if key.startswith("mtp"):
            assert torch.equal(tensor, before[key]), key
        elif name == "uneven":
            torch.testing.assert_close(tensor, tuned[key], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, tuned[key]), key
    assert (logits(tmp_path / "merged") - logits(base)).abs().max() > 1e-2
    assert load_tokenizer(tmp_path / "merged").vocab_size == load_tokenizer(base).vocab_size


def test_frozen_weights_stay_as_they_are_stored(folder: Path, tmp_path: Path, esft: Path) -> None:
    """A base in bfloat16: stacks that change are written in full, and nothing else is."""
    export_hf(base_of(folder, "v3"), tmp_path / "bf16", dtype="bf16", quiet=True)
    export_adapter(esft, tmp_path / "delta")
    merge(tmp_path / "bf16", tmp_path / "delta", tmp_path / "merged", quiet=True)
    merged, tuned = load_model(tmp_path / "merged", dtype=None).state_dict(), load_model(esft).state_dict()
    before = load_model(tmp_path / "bf16", dtype=None).state_dict()
    for name, tensor in merged.items():
        if "blocks" in name and ".experts." in name:
            assert torch.equal(tensor[[0, 2, 5]], tuned[name][[0, 2, 5]]), name
            assert torch.equal(tensor[[1, 3, 4, 6, 7]], before[name][[1, 3, 4, 6, 7]].float()), name
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name


def test_another_model_of_the_same_shape_is_refused(folder: Path, tmp_path: Path, esft: Path) -> None:
    export_hf(base_of(folder, "v3"), tmp_path / "other", quiet=True)
    weights = load_file(tmp_path / "other/model.safetensors")
    name = next(name for name in weights if name.endswith("mlp.gate.weight"))
    save_file({**weights, name: weights[name] + 1e-3}, tmp_path / "other/model.safetensors")
    export_adapter(esft, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="has the right shape and other routers"):
        merge(tmp_path / "other", tmp_path / "delta", tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged").exists()


def test_dense_models_are_told_from_each_other_by_their_embeddings(folder: Path) -> None:
    """A dense model has no routers that could differ."""
    model = load_model(base_of(folder, "dense"))
    known = Base.of(model)
    known.require(model.bfloat16(), "adapter", folder)
    with torch.no_grad():
        model.embedding.weight[3] += 1
    with pytest.raises(CheckpointError, match="has the right shape and other embeddings"):
        known.require(model, "adapter", folder)


def test_a_delta_holds_the_chosen_experts_alone(folder: Path, tmp_path: Path, esft: Path) -> None:
    export_adapter(esft, tmp_path / "delta")
    tensors = load_file(tmp_path / "delta/delta.safetensors")
    tuned = load_model(esft).state_dict()
    layers = load_model(esft).config.moe_layers
    stacks = [f"blocks.{n}.feed_forward.experts.{name}" for n in layers for name in ("gate_up_proj", "down_proj")]
    assert tensors.keys() == {f"{stack}.{e}" for stack in stacks for e in (0, 2, 5)}
    for key, one in tensors.items():
        stack, _, expert = key.rpartition(".")
        assert torch.equal(one, tuned[stack][int(expert)])
    about = json.loads((tmp_path / "delta/delta.json").read_text())
    assert about["experts"] == {str(layer): [5, 0, 2] for layer in layers}


def test_another_base_is_refused(folder: Path, tmp_path: Path, esft: Path, lora: Path) -> None:
    export_adapter(esft, tmp_path / "delta")
    export_adapter(lora, tmp_path / "lora")
    for adapter in (tmp_path / "delta", tmp_path / "lora"):
        with pytest.raises(CheckpointError, match="made for a model of another shape"):
            merge(base_of(folder, "deepseek-moe"), adapter, tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged").exists()


def test_what_is_no_adapter_is_refused(folder: Path, tmp_path: Path, esft: Path) -> None:
    base = base_of(folder, "v3")
    with pytest.raises(CheckpointError, match=r"this one is of kind 'everything': export the model itself"):
        export_adapter(base, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"becomes a delta, which is of no family"):
        export_adapter(esft, tmp_path / "out", family="llama")
    with pytest.raises(CheckpointError, match=r"neither adapter_config\.json, as PEFT writes, nor delta\.json"):
        merge(base, esft, tmp_path / "merged", quiet=True)
    assert not (tmp_path / "out").exists()


def adapter(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One that PEFT could have made for the query projection of a first layer."""
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_dora": False, "rank_pattern": {}}
    key = f"{HF}.0.self_attn.q_proj"
    return {**raw, **changes}, {f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'"),
        ({"use_dora": True}, r"use_dora True changes what the adapter does"),
        ({"use_rslora": True}, r"use_rslora True"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern"),
        ({"bias": "all"}, r"bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa'"),
        ({"r": 0}, r"r is 0"),
        ({"lora_alpha": None}, r"lora_alpha None"),
    ],
)
def test_settings_that_change_the_function_are_refused(changes: dict[str, Any], said: str, folder: Path) -> None:
    raw, tensors = adapter(**changes)
    with pytest.raises(CheckpointError, match=said):
        from_peft(raw, tensors, load_model(base_of(folder, "dense")).config, FAMILIES["llama"], "it")


def test_tensors_that_have_no_place_are_refused(folder: Path) -> None:
    config, family = load_model(base_of(folder, "dense")).config, FAMILIES["llama"]
    raw, tensors = adapter()
    (found,) = from_peft(raw, tensors, config, family, "it")
    assert (found.ours, found.index, found.scale) == ("blocks.0.attention.q_proj.weight", (), 2.0)
    for odd, said in (
        ({f"{HF}.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}, "has no lora_B"),
        ({f"{HF}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(16)}, "lora_magnitude_vector is no factor"),
        ({f"{HF}.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 15)}, "fits no matrix of the model"),
    ):
        with pytest.raises(CheckpointError, match=said):
            from_peft(raw, {**tensors, **odd}, config, family, "it")
    shifted = {key.replace("layers.0", "layers.9"): one for key, one in tensors.items()}
    with pytest.raises(CheckpointError, match="fits no matrix of the model"):
        from_peft(raw, shifted, config, family, "it")


def test_factors_of_experts_transposed_as_before_peft_0_19_are_refused(
    folder: Path, tmp_path: Path, lora: Path
) -> None:
    export_adapter(lora, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "experts.lora_A" in name)
    a, b = tensors[key], tensors[key.replace("_A", "_B")]
    tensors[key], tensors[key.replace("_A", "_B")] = b.T.contiguous(), a.T.contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"fit no stack of experts.*before 0\.19"):
        merge(base_of(folder, "v3"), tmp_path / "adapter", tmp_path / "merged", quiet=True)


def test_what_peft_has_no_module_for_is_told_with_what_can_be_written(folder: Path, tmp_path: Path, lora: Path) -> None:
    can = r"a PEFT folder can be written of models of llama, .*deepseek_v3\. The merged model can be exported"
    experts = tune(folder, "gshard", "own-code", kind="lora", targets=["experts"])
    with pytest.raises(CheckpointError, match=r"transformers has no class of its own for deepseek, .*" + can):
        export_adapter(experts, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--family llama: the model cannot be written as llama"):
        export_adapter(lora, tmp_path / "out", family="llama")
    config = load_model(base_of(folder, "dense")).config
    odd = LowRank("blocks.0.attention.r_proj.weight", torch.ones(2, 16), torch.ones(16, 2))
    with pytest.raises(
        CheckpointError, match=r"the class of llama has no module for blocks.0.attention.r_proj.*" + can
    ):
        to_peft(config, FAMILIES["llama"], [odd], 4.0)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_its_note_is_merged_by_the_family_of_the_base(
    folder: Path, tmp_path: Path, lora: Path
) -> None:
    """As one that PEFT wrote."""
    export_adapter(lora, tmp_path / "adapter")
    merge(base_of(folder, "v3"), tmp_path / "adapter", tmp_path / "one", quiet=True)
    (tmp_path / "adapter/finemoe.json").unlink()
    export_hf(base_of(folder, "v3"), tmp_path / "hf", quiet=True)
    merge(tmp_path / "hf", tmp_path / "adapter", tmp_path / "other", quiet=True)
    same(tmp_path / "one", tmp_path / "other")
