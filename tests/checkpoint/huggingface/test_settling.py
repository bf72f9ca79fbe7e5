"""Where config.json and the weights contradict each other: the weights decide, loudly, whoever opens them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.huggingface.published import LLAMA, TIED, V3, contents_of, publish, tensors_of, write_weights
from finemoe.checkpoint.doctor.examine import examine
from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.checkpoint.huggingface.importing import import_hf, open_source
from finemoe.checkpoint.open import load_model, read_model_config
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.runs.planning.sizing import size

QWEN2_MOE: dict[str, Any] = {
    **{"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 24, "hidden_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
    **{"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "norm_topk_prob": False},
}
GLM: dict[str, Any] = {
    **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 24, "hidden_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
    **{"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "head_dim": 8},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("finemoe"), "propagate", True)


def told(folder: Path, raw: dict[str, Any], weights: dict[str, Tensor], caplog: Any) -> tuple[ModelConfig, str]:
    """The model of a folder whose config.json says `raw`, the same to all who open it, and the warning of all."""
    publish(folder, raw)
    write_weights(folder, weights)
    source = open_source(folder)
    (warning,) = source.warnings
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        model = load_model(folder)
    assert [record.message for record in caplog.records] == [warning]
    report = import_hf(folder, folder.with_name("imported"), quiet=True)
    assert report.warnings == (warning,)
    assert warning in [f.text for f in examine(folder).findings if f.severity == "warning"]
    assert [f.text for f in examine(folder).problems if f.about != "tokenizer"] == []
    assert model.config == source.config == report.config == read_model_config(folder)
    assert size(folder) == size(folder.with_name("imported"))
    # What came in goes out as it was, and is read in the same way again.
    exported = export_hf(folder.with_name("imported"), folder.with_name("exported"), quiet=True)
    assert exported.verbatim_config
    assert contents_of(folder.with_name("exported")) == contents_of(folder)
    assert open_source(folder.with_name("exported")).config == source.config
    return source.config, warning


def test_a_head_of_its_own_though_config_json_says_tied(tmp_path: Path, caplog: Any) -> None:
    weights = tensors_of(TIED)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    config, warning = told(tmp_path / "source", TIED, weights, caplog)
    assert not config.tie_embeddings
    assert "lm_head.weight of its own: it is used" in warning
    model = load_model(tmp_path / "source")
    assert torch.equal(model.state_dict()["head.weight"], weights["lm_head.weight"].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_that_is_stored_twice_is_no_contradiction(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tensors_of(TIED)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].to(dtype, copy=True)
    source = publish(tmp_path / "source", TIED)
    write_weights(source, weights)
    opened = open_source(source)
    assert opened.config.tie_embeddings
    assert opened.warnings == ()
    import_hf(source, tmp_path / "in", quiet=True)
    export_hf(tmp_path / "in", tmp_path / "out", quiet=True)
    assert contents_of(tmp_path / "out") == contents_of(source)


def test_no_head_though_config_json_does_not_tie(tmp_path: Path, caplog: Any) -> None:
    weights = tensors_of(LLAMA)
    del weights["lm_head.weight"]
    config, warning = told(tmp_path / "source", LLAMA, weights, caplog)
    assert config.tie_embeddings
    assert "the embedding is the head" in warning


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers"])
@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2", "glm4_moe"])
def test_prediction_modules_that_nobody_announces(tmp_path: Path, caplog: Any, family: str, field: str) -> None:
    raw = {**(GLM if family == "glm4_moe" else V3), "model_type": family}
    weights = tensors_of({**raw, "num_nextn_predict_layers": 2})
    raw.pop("num_nextn_predict_layers")
    config, warning = told(tmp_path / "source", {**raw, field: 0}, weights, caplog)
    assert len(config.mtp) == 2
    assert "announces no multi-token prediction module(s), and the weights hold 2" in warning


def test_more_prediction_modules_than_announced(tmp_path: Path, caplog: Any) -> None:
    config, warning = told(tmp_path / "source", V3, tensors_of({**V3, "num_nextn_predict_layers": 3}), caplog)
    assert len(config.mtp) == 3
    assert "announces 1" in warning


def test_announced_prediction_modules_that_are_absent(tmp_path: Path, caplog: Any) -> None:
    weights = {key: tensor for key, tensor in tensors_of(V3).items() if not key.startswith("model.layers.2.")}
    config, warning = told(tmp_path / "source", V3, weights, caplog)
    assert config.mtp == ()
    assert "promises 1" in warning


def test_two_prediction_modules_are_announced_and_one_is_there(tmp_path: Path, caplog: Any) -> None:
    config, warning = told(tmp_path / "source", {**V3, "num_nextn_predict_layers": 2}, tensors_of(V3), caplog)
    assert len(config.mtp) == 1
    assert "promises 2 multi-token prediction module(s), and the weights hold 1: opened with 1" in warning
    assert "without" not in warning


def test_a_torn_module_that_nobody_announces_is_carried(tmp_path: Path, caplog: Any) -> None:
    weights = tensors_of(V3)
    del weights["model.layers.2.mlp.experts.3.down_proj.weight"]
    config, warning = told(tmp_path / "source", {**V3, "num_nextn_predict_layers": 0}, weights, caplog)
    assert config.mtp == ()
    assert "is not whole" in warning
    (tmp_path / "source" / "config.json").write_text(json.dumps(V3))
    with pytest.raises(CheckpointError, match="1 tensor is missing"):
        open_source(tmp_path / "source")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("raw", "flag", "setting"),
    [
        (QWEN2_MOE, "qkv_bias", ("qkv_bias", True, False)),
        (GLM, "attention_bias", ("qkv_bias", True, False)),
        (GLM, "use_qk_norm", ("qk_norm", "head", "none")),
    ],
)
def test_biases_and_norms_that_nobody_announces(
    tmp_path: Path, caplog: Any, raw: dict[str, Any], flag: str, setting: tuple[str, Any, Any], there: bool
) -> None:
    config, warning = told(tmp_path / "source", {**raw, flag: not there}, tensors_of({**raw, flag: there}), caplog)
    name, yes, no = setting
    assert getattr(config.blocks[0].attention, name) == (yes if there else no)
    assert f"`{flag}` is {str(not there).lower()}" in warning


def test_an_overlay_lies_over_the_shards(tmp_path: Path, caplog: Any) -> None:
    folder = publish(tmp_path / "source", LLAMA, shards=2)
    old = tensors_of(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    write_weights(folder, old, shards=2)
    save_file({name: old[name] / 2}, folder / "model-overlay.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-overlay.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load_model(folder)
    assert torch.equal(model.state_dict()["blocks.1.feed_forward.up_proj.weight"], old[name].float() / 2)
    report = import_hf(folder, tmp_path / "imported", quiet=True)
    assert "in several files" in report.warnings[0]
    assert report.warnings[0] in [f.text for f in examine(folder).findings]
    # A tensor that the index forgot is taken where the model needs it, and only then.
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("missing in the index" in text for text in open_source(folder).warnings)
    assert [f.text for f in examine(folder).problems if f.about != "tokenizer"] == []


def test_what_the_family_cannot_compute_stays_a_refusal(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    folder = publish(tmp_path / "source", LLAMA, extra=extra)
    with pytest.raises(CheckpointError, match=r"known to no part of the model: .*q_norm"):
        open_source(folder)
