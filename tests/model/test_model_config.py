"""Model configurations: what they refuse, and how a compact recipe becomes a list of blocks."""

from __future__ import annotations

from typing import Any

import pytest

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig, ModelRecipe
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.presets import find_preset, resolve
from oracles.models import LATENT, moe_table, small_config, v3_config

SMALL: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 4,
    "num_layers": 3,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 2},
    "feed_forward": {"kind": "dense", "ffn_hidden_size": 4},
}

REFUSED = {
    "more choices than experts": (
        {"feed_forward": moe_table(experts_per_token=7)},
        "experts_per_token 7 is above",
    ),
    "uneven devices": (
        {"feed_forward": moe_table(balance={"device": 0.1, "num_devices": 4})},
        "num_devices 4 does not divide num_routed_experts 6",
    ),
    "balance of a fixed router": (
        {"feed_forward": moe_table("hash_layer", balance={"expert": 0.1})},
        "learns nothing",
    ),
    "sharper than the scores are": (
        {"feed_forward": moe_table("sigmoid_biased", balance={"expert": 0.1})},
        "balance.expert needs scores that sum to 1",
    ),
    "a gate over nothing": (
        {"feed_forward": moe_table(num_shared_experts=0, gate_shared_experts=True)},
        "num_shared_experts is 0: there is nothing to gate",
    ),
    "more than every sequence exempt": (
        {"feed_forward": moe_table(capacity_factor=1.0, capacity_exempt=1.1)},
        "capacity_exempt",
    ),
    "a clamp at 0": ({"feed_forward": moe_table(swiglu_limit=0)}, "swiglu_limit"),
    "odd rotary part": ({"attention": {**LATENT, "qk_rope_head_dim": 3}}, "qk_rope_head_dim 3 is odd"),
    "unknown attention": ({"attention": {"kind": "latents"}}, "did you mean `latent`"),
    "unknown scaling": (
        {"attention": {**LATENT, "rope": {"scaling": {"kind": "yarm", "factor": 2}}}},
        "did you mean `yarn`",
    ),
    "a theta of 1": ({"attention": {**LATENT, "rope": {"theta": 1}}}, "attention.rope.theta"),
    "negative depth": ({"mtp_depth": -1}, "mtp_depth"),
    "capacity of 0": ({"feed_forward": moe_table(capacity_factor=0)}, "capacity_factor"),
    "uneven key heads": (
        {"attention": {"num_heads": 4, "num_kv_heads": 3, "head_dim": 2}},
        "num_heads 4 is not a multiple of num_kv_heads 3",
    ),
    "odd head": ({"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 3}}, "head_dim 3 is odd"),
    "more leading layers than layers": ({"leading": {"count": 4}}, "leading.count 4 is above num_layers 3"),
    "infinite deviation": ({"init_std": float("inf")}, "init_std"),
    "no layer": ({"num_layers": 0}, "num_layers"),
    "unknown router": ({"feed_forward": moe_table("softmax")}, "softmax_topk"),
    "unknown layer": ({"feed_forward": {"kind": "mo"}}, "`moe`"),
    "missing width": ({"feed_forward": {"kind": "dense"}}, "ffn_hidden_size` is required and missing"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.toml: ") as error:
        parse(ModelRecipe, {**SMALL, **changes}, "recipe.toml")
    assert message in str(error.value)


def test_a_model_needs_a_layer() -> None:
    with pytest.raises(ConfigError, match="blocks is empty"):
        parse(ModelConfig, {"vocab_size": 1, "hidden_size": 1, "blocks": []}, "here")


def test_leading_layers_differ_where_they_say_so() -> None:
    config = small_config(num_layers=4, leading={"count": 2, "feed_forward": {"kind": "dense", "ffn_hidden_size": 5}})
    assert [block.feed_forward.kind for block in config.blocks] == ["dense", "dense", "moe", "moe"]
    assert len({block.attention for block in config.blocks}) == 1
    assert config.moe_layers == (2, 3)


def test_prediction_modules_have_the_block_of_the_last_layer() -> None:
    config = v3_config(num_layers=3, mtp_depth=2)
    assert config.mtp == (config.blocks[-1],) * 2
    assert config.moe_layers == (1, 2)
    assert small_config().mtp == ()


def test_leading_layers_may_have_their_own_attention() -> None:
    config = small_config(leading={"count": 1, "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 4}})
    assert [block.attention.num_heads for block in config.blocks] == [1, 4]
    assert [block.feed_forward.kind for block in config.blocks] == ["moe", "moe"]


def test_resolve_lays_a_recipe_over_its_preset() -> None:
    recipe = resolve({"preset": "tiny-moe", "num_layers": 2, "feed_forward": {"experts_per_token": 3}}, "here")
    assert (recipe.num_layers, recipe.feed_forward.experts_per_token) == (2, 3)
    assert recipe.feed_forward.num_routed_experts == find_preset("tiny-moe").model["feed_forward"]["num_routed_experts"]


def test_resolve_replaces_a_layer_of_another_kind() -> None:
    recipe = resolve({"preset": "tiny-moe", "feed_forward": {"kind": "dense", "ffn_hidden_size": 9}}, "here")
    assert recipe.feed_forward == DenseConfig(ffn_hidden_size=9)


def test_resolve_takes_a_model_without_preset() -> None:
    assert resolve(SMALL, "here").num_layers == 3


def test_unknown_preset_suggests_one() -> None:
    with pytest.raises(ConfigError, match="here: unknown `preset` `tiny-mo`, did you mean `tiny-moe`"):
        resolve({"preset": "tiny-mo"}, "here")


def test_unknown_key_over_a_preset_suggests_one() -> None:
    with pytest.raises(ConfigError, match="did you mean `num_layers`"):
        resolve({"preset": "tiny-moe", "num_layer": 2}, "here")
