"""Metadata of GGUF files and ModelConfig: there and back, and every key that must be refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from checkpoint.gguf.gguf_files import (
    DENSE,
    LATENT,
    MODELS,
    NORMALISED,
    QUERIES,
    QWEN3,
    SIGMOID,
    YARN,
    config_of,
    moe,
    recipe,
)
from finemoe.checkpoint.gguf.config import Facts, model_config
from finemoe.checkpoint.gguf.keys import stored_tensors
from finemoe.checkpoint.gguf.llama3 import llama3_scaling
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import PRESETS, resolve

LEAD = {"count": 1, "feed_forward": DENSE}
LITE = recipe({**LATENT, "q_lora_rank": None}, moe({"kind": "softmax_topk"}), leading=LEAD)


def read_back(config: ModelConfig, **changes: Any) -> ModelConfig:
    """What a file that `config` was written to says; `changes` overrides keys, None removes them."""
    found = describe(config)
    values = {"general.architecture": found.architecture, **found.values}
    for key, value in changes.items():
        values[f"{found.architecture}.{key.replace('__', '.')}"] = value
    values = {key: value for key, value in values.items() if value is not None}
    names = {stored.name for stored in stored_tensors(config)}
    return model_config(values, Facts(names, config.vocab_size, found.rope_factors), "file")


@pytest.mark.parametrize("name", MODELS)
def test_small_models_come_back(name: str) -> None:
    config = config_of(MODELS[name])
    assert read_back(config) == config


def refusal(config: ModelConfig) -> str | None:
    try:
        describe(config)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_or_are_refused_for_a_reason(name: str) -> None:
    config = expand(resolve({"preset": name}, name))
    config = config.model_copy(update={"mtp": (), "max_positions": config.max_positions or 4096})
    refused = refusal(config)
    if refused is not None:
        assert refused.startswith("this model cannot be written to GGUF: ")
        return
    back = read_back(config)
    assert back.model_copy(update={"init_std": config.init_std}).model_dump(exclude={"blocks"}) == config.model_dump(
        exclude={"blocks"}
    )
    for ours, theirs in zip(config.blocks, back.blocks, strict=True):
        assert theirs.attention == ours.attention
        if ours.feed_forward.kind == "moe":
            plain = {"balance": theirs.feed_forward.balance, "capacity_factor": None}
            plain |= {"capacity_level": "expert", "capacity_exempt": 0.0}
            assert theirs.feed_forward == ours.feed_forward.model_copy(update=plain)
        else:
            assert theirs.feed_forward == ours.feed_forward


def test_the_published_families_have_a_place() -> None:
    """Those that llama.cpp computes as published: all but group-limited V2."""
    for name, architecture in {
        "deepseek-llm-7b": "llama",
        "deepseek-moe-16b": "deepseek",
        "deepseek-v2-lite": "deepseek2",
        "deepseek-v3": "deepseek2",
        "smollm2-135m": "llama",
    }.items():
        assert describe(expand(resolve({"preset": name}, name))).architecture == architecture


@pytest.mark.parametrize(
    ("model", "key", "value", "words"),
    [
        ("llama", "block_count", None, "has no llama.block_count"),
        ("llama", "block_count", 1 << 30, "only 30 tensors"),
        ("llama", "block_count", -3, "from 1"),
        ("llama", "block_count", "three", "whole number"),
        ("llama", "block_count", True, "whole number"),
        ("llama", "embedding_length", None, "has no llama.embedding_length"),
        ("llama", "context_length", None, "has no llama.context_length"),
        ("llama", "attention__layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
        ("llama", "attention__layer_norm_rms_epsilon", math.inf, "finite"),
        ("llama", "attention__head_count", 0, "from 1"),
        ("llama", "attention__head_count", [4, 4, 2], "differs from layer to layer"),
        ("llama", "attention__head_count_kv", 3, "not a multiple"),
        ("llama", "attention__value_length", 8, "value_length"),
        ("llama", "attention__sliding_window", 4096, "only 0"),
        ("llama", "attention__scale", 0.5, "only 0.0"),
        ("llama", "attention__causal", False, "only True"),
        ("llama", "attention__causal", 1, "only True"),
        ("llama", "logit_scale", 0.5, "only 0.0"),
        ("llama", "rope__dimension_count", 8, "all 16 components"),
        ("llama", "rope__scaling__type", "longrope", "none, linear and yarn"),
        ("llama", "rope__scaling__type", 3, "text"),
        ("llama", "vocab_size", 100, "has 288 rows"),
        ("llama", "expert_weights_norm", False, "does otherwise for llama"),
        ("llama", "swiglu_clamp_exp", [7.0], "not known"),
        ("llama-yarn", "rope__scaling__attn_factor", 1.2, "only 1.0"),
        ("llama-yarn", "rope__scaling__yarn_log_multiplier", 0.1, "deepseek2 files only"),
        ("llama-yarn", "rope__scaling__yarn_beta_fast", 16.0, "only 32.0"),
        ("mixtral", "expert_shared_feed_forward_length", 64, "0 times"),
        ("mixtral", "expert_used_count", 9, "experts_per_token"),
        ("deepseek", "expert_weights_norm", True, "does otherwise for deepseek"),
        ("qwen2", "attention__head_count", 2, "heads of embedding_length / head_count"),
        ("qwen2", "expert_count", 8, "has dense layers only"),
        ("qwen3", "attention__sliding_window", 512, "only 0"),
        ("qwen2moe", "expert_count", None, "has experts only"),
        ("qwen2moe", "expert_shared_feed_forward_length", 65, "times 32"),
        ("qwen2moe", "expert_weights_norm", True, "does otherwise for qwen2moe"),
        ("qwen3moe", "leading_dense_block_count", 1, "every layer of qwen3moe routes"),
        ("qwen3moe", "expert_shared_count", 1, "must be 0 times"),
        ("qwen3moe", "expert_weights_scale", 2.5, "only 1.0"),
        ("olmoe", "expert_feed_forward_length", 16, "have feed_forward_length"),
        ("olmoe", "attention__head_count_kv", 2, "a key for each of its 4 heads"),
        ("deepseek", "expert_gating_func", 2, "only softmax"),
        ("deepseek2-v3", "expert_gating_func", 3, r"1 \(softmax\) and 2 \(sigmoid\)"),
        ("deepseek2-v3", "expert_gating_func", 1, "exp_probs_b"),
        ("deepseek2-v3", "expert_group_count", 3, "does not divide"),
        ("deepseek2-v3", "nextn_predict_layers", 1, "only 0"),
        ("deepseek2-v3", "attention__key_length", 40, "must be 72"),
        ("deepseek2-v3", "attention__key_length_mla", 8, "no room"),
        ("deepseek2-v3", "attention__temperature_scale", 0.1, "only 0.0"),
        ("deepseek2-v2", "rope__scaling__yarn_log_multiplier", None, "sharpens attention twice"),
        ("deepseek2-v2", "rope__scaling__type", "linear", "sharpens"),
    ],
)
def test_keys_that_cannot_be_honoured_are_named(model: str, key: str, value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_back(config_of(MODELS[model]), **{key: value})


@pytest.mark.parametrize(
    ("general", "words"),
    [
        ({"general.architecture": "gemma"}, "'gemma'; qwen2, .* deepseek2 are read"),
        ({"general.architecture": ["llama"]}, "are read"),
        ({}, "is None; "),
        ({"general.architecture": "llama", "general.type": "adapter"}, "only whole models"),
    ],
)
def test_other_files_are_refused(general: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        model_config(general, Facts(set(), 10, None), "file")


def test_keys_that_only_describe_are_ignored() -> None:
    config = config_of(MODELS["llama"])
    assert read_back(config, rope__scaling__finetuned=True, attention__sliding_window=0) == config
    assert read_back(config, feed_forward_length=[96, 96, 96], attention__head_count=[4, 4, 4]) == config


def test_widths_of_experts_that_early_files_leave_out() -> None:
    """Qwen1.5-MoE: the experts of a token together, and the shared ones, are as wide as feed_forward_length."""
    config = config_of(MODELS["qwen2moe"])
    left_out = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}
    assert read_back(config, feed_forward_length=3 * 32, **left_out) == config


def test_linear_scaling_under_its_old_name() -> None:
    config = config_of(MODELS["llama-linear"])
    old = {"rope__scaling__type": None, "rope__scaling__factor": None, "rope__scale_linear": 4.0}
    assert read_back(config, **old) == config


def test_group_limited_routing_is_read() -> None:
    config = config_of(recipe(LATENT, moe({"kind": "softmax_topk", "route_scale": 16.0}), leading=LEAD))
    back = read_back(config, expert_group_count=4, expert_group_used_count=2)
    router = back.blocks[1].feed_forward.router
    assert (router.kind, router.num_groups, router.groups_per_token, router.route_scale) == ("group_limited", 4, 2, 16)
    with pytest.raises(CheckpointError, match="not normalised"):
        read_back(config, expert_group_count=4, expert_group_used_count=2, expert_weights_norm=True)


def test_yarn_is_written_as_llama_cpp_reads_it() -> None:
    rope = {"layout": "interleaved", "scaling": YARN}
    values = describe(config_of(recipe({**LATENT, "rope": rope}, moe(SIGMOID), leading=LEAD))).values
    assert values["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert values["deepseek2.rope.scaling.original_context_length"] == 128


def latent(**changes: Any) -> dict[str, Any]:
    return recipe({**LATENT, **changes}, moe(SIGMOID), leading=LEAD)


def queries(**changes: Any) -> dict[str, Any]:
    return recipe({**QUERIES, **changes}, DENSE)


def yarn(layout: str, **changes: Any) -> dict[str, Any]:
    return {"layout": layout, "scaling": {**YARN, **changes}}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (queries(qk_norm="projection"), "no qk_norm 'projection' in llama"),
        (queries(qk_norm="head", rope={"layout": "interleaved"}), "no qk_norm 'head' in llama"),
        (queries(rotary_dim=8), "whole heads, not rotary_dim 8"),
        (recipe({**QUERIES, "qk_norm": "head"}, moe({"kind": "softmax_topk"}, 0)), "no qk_norm 'head' in deepseek"),
        (recipe({**QUERIES, "qk_norm": "projection"}, moe({"kind": "softmax_topk"}, 0)), "no qk_norm 'projection'"),
        (recipe(QWEN3, moe({"kind": "softmax_topk", "normalize_gates": True})), "neither shared experts"),
        (
            recipe(QWEN3, moe({"kind": "softmax_topk", "normalize_gates": True, "route_scale": 2.0}, 0)),
            "no route_scale",
        ),
        (recipe(QWEN3, moe(NORMALISED, 0), leading=LEAD), "in qwen3moe llama.cpp has no dense layers before"),
        (recipe(QUERIES, {**moe({"kind": "softmax_topk"}), "gate_shared_experts": True}), "no gate .* in deepseek"),
        (queries(rope=yarn("half_split")), "mscale 1 and mscale_all_dim 0"),
        (queries(rope=yarn("half_split", mscale=1.0, mscale_all_dim=0.0, beta_fast=16.0)), "beta_fast 32"),
        (queries(rope=yarn("half_split", mscale=1.0, mscale_all_dim=0.0, truncate=False)), "whole components"),
        (recipe(QUERIES, {**DENSE, "swiglu_limit": 7.0}), "swiglu_limit"),
        (recipe(QUERIES, moe({"kind": "hash_layer"})), "not by hash_layer"),
        (recipe(QUERIES, moe(SIGMOID)), "not by sigmoid_biased"),
        (recipe(QUERIES, moe({"kind": "softmax_topk"}, 0)), "wants shared experts in deepseek"),
        (recipe(QUERIES, moe({"kind": "softmax_topk", "normalize_gates": True})), "neither shared experts"),
        (recipe(QUERIES, moe({"kind": "softmax_topk", "normalize_gates": True}, 0), leading=LEAD), "no dense layers"),
        (recipe({**QUERIES, "head_dim": 32}, moe({"kind": "softmax_topk"})), "as wide as hidden_size"),
        (latent(latent_norm_eps=1e-5), "latent_norm_eps 1e-05 is not norm_eps 1e-06"),
        (latent(rope={"layout": "half_split"}), "must be interleaved"),
        (latent(rope=yarn("interleaved", mscale=1.0)), "are equal"),
        (latent(rope={"layout": "interleaved", "scaling": {"kind": "linear", "factor": 2.0}}), "linear rope scaling"),
        (recipe(LATENT, moe(SIGMOID), leading=LEAD, num_layers=27), "27 layers for one without query compression"),
        (recipe(LATENT, moe({**SIGMOID, "score_function": "sqrtsoftplus"}), leading=LEAD), "sqrtsoftplus"),
        (recipe(LATENT, moe({"kind": "group_limited", "num_groups": 4, "groups_per_token": 2})), "two best scores"),
        (
            recipe(LATENT, moe({"kind": "sigmoid_biased", "num_groups": 8, "groups_per_token": 4})),
            "more than one expert",
        ),
        (recipe(LATENT, moe({"kind": "hash_layer"})), "no router like hash_layer"),
    ],
)
def test_models_that_llama_cpp_does_not_have_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be written to GGUF: .*{words}"):
        describe(config_of(raw))


def test_a_model_is_written_under_the_name_of_its_family() -> None:
    for name in MODELS:
        assert describe(config_of(MODELS[name])).architecture == name.partition("-")[0].replace("mixtral", "llama")


def test_groups_that_are_all_used_are_none() -> None:
    """The file says that there is one, and what is read back computes the same."""
    config = config_of(recipe(LATENT, moe({**SIGMOID, "groups_per_token": 4}), leading=LEAD))
    assert describe(config).values["deepseek2.expert_group_count"] == 1
    assert read_back(config).blocks[1].feed_forward.router.num_groups == 1


def test_layers_that_differ_are_refused_by_number() -> None:
    config = config_of(MODELS["deepseek"])
    swapped = config.model_copy(update={"blocks": (*config.blocks[:2], config.blocks[0])})
    with pytest.raises(CheckpointError, match="layer 2 is not like layer 1"):
        describe(swapped)


def test_layers_may_differ_in_what_only_training_uses() -> None:
    config = config_of(MODELS["deepseek"])
    block = config.blocks[2]
    other = block.feed_forward.model_copy(update={"capacity_factor": 1.5})
    mixed = config.model_copy(update={"blocks": (*config.blocks[:2], block.model_copy(update={"feed_forward": other}))})
    assert describe(mixed).values == describe(config).values


def test_query_compression_left_out_is_written_so_that_llama_cpp_knows() -> None:
    assert describe(config_of(LITE)).values["deepseek2.attention.q_lora_rank"] == 0
    lite = describe(config_of({**LITE, "num_layers": 27})).values
    assert "deepseek2.attention.q_lora_rank" not in lite


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "high", "original"),
    [(500_000.0, 128, 8.0, 4.0, 8192), (500_000.0, 64, 32.0, 4.0, 8192), (10_000.0, 32, 16.0, 6.0, 256)],
)
def test_llama_3_scaling_is_found_in_its_factors(
    theta: float, dim: int, factor: float, high: float, original: int
) -> None:
    scaling = {"kind": "llama3", "factor": factor, "high_freq_factor": high, "original_max_positions": original}
    config = config_of(queries(head_dim=dim, rope={"theta": theta, "scaling": scaling}))
    factors = describe(config).rope_factors
    assert factors is not None
    assert llama3_scaling(factors, theta, "file") == {**scaling, "low_freq_factor": 1.0}


def test_a_low_frequency_factor_of_another_size_gives_the_same_frequencies() -> None:
    scaling = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    raw = queries(head_dim=64, rope={"theta": 10_000.0, "scaling": {**scaling, "original_max_positions": 512}})
    rope = config_of(raw).blocks[0].attention.rope
    back = read_back(config_of(raw)).blocks[0].attention.rope
    plain = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert (back.scaling.low_freq_factor, back.scaling.high_freq_factor) == (1.0, 4.0)
    torch.testing.assert_close(
        back.scaling.inverse_frequencies(plain, 1e4), rope.scaling.inverse_frequencies(plain, 1e4), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "factors", [torch.ones(8), torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([1.0, math.nan]), torch.zeros(4)]
)
def test_other_frequency_factors_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        llama3_scaling(factors, 1e4, "file")
