"""The named models: complete, unlike each other where they must be, and the ladders' rungs alike where they must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import GROUPS, PRESETS, group_of, resolve
from finemoe.model.size import measure
from oracles.models import build

LADDERS = ("tiny", "mini")

# What the released configurations say: positions, base, scaling, epsilon, biases.
ROTARY: dict[str, tuple[int, float, str | None, float, bool]] = {
    "deepseek-moe-16b": (4096, 1e4, None, 1e-6, False),
    "deepseek-llm-7b": (4096, 1e4, None, 1e-6, False),
    "deepseek-llm-67b": (4096, 1e4, None, 1e-6, False),
    "deepseek-coder-33b": (16384, 1e5, "linear", 1e-6, False),
    "deepseek-v2-lite": (163840, 1e4, "yarn", 1e-6, False),
    "deepseek-v3": (163840, 1e4, "yarn", 1e-6, False),
    "deepseek-r1-distill-qwen-1.5b": (131072, 1e4, None, 1e-6, True),
    "deepseek-r1-distill-qwen-7b": (131072, 1e4, None, 1e-6, True),
    "deepseek-r1-distill-qwen-14b": (131072, 1e6, None, 1e-5, True),
    "deepseek-r1-distill-qwen-32b": (131072, 1e6, None, 1e-5, True),
    "deepseek-r1-distill-llama-8b": (131072, 5e5, "llama3", 1e-5, False),
    "deepseek-r1-distill-llama-70b": (131072, 5e5, "llama3", 1e-5, False),
    "smollm2-135m": (8192, 1e5, None, 1e-5, False),
}


def config_of(name: str) -> ModelConfig:
    return expand(resolve({"preset": name}, name))


def test_no_name_stands_in_two_groups() -> None:
    assert sum(map(len, GROUPS.values())) == len(PRESETS)
    assert all(name in GROUPS[group_of(name)] for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_which_attention_it_has(name: str) -> None:
    # A recipe that lays `kind = "latent"` over a preset replaces the table only where the preset names its own kind.
    assert PRESETS[name].model["attention"]["kind"] in ("grouped_query", "latent")
    other = {"kind": "latent", "num_heads": 1, "kv_lora_rank": 2, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2}
    over = {"preset": name, "attention": {**other, "v_head_dim": 2}}
    assert resolve(over, name).attention.kind == "latent"


@pytest.mark.parametrize("name", PRESETS)
def test_an_override_within_the_rotary_table_keeps_the_layout(name: str) -> None:
    recipe = resolve({"preset": name, "attention": {"rope": {"theta": 5e6}}}, name)
    assert recipe.attention.rope.layout == config_of(name).blocks[0].attention.rope.layout
    assert (recipe.attention.rope.layout == "interleaved") == (recipe.attention.kind == "latent")


@pytest.mark.parametrize("name", ROTARY)
def test_positions_are_as_released(name: str) -> None:
    config = config_of(name)
    attention = config.blocks[0].attention
    scaling = attention.rope.scaling
    biased = attention.kind == "grouped_query" and attention.qkv_bias
    found = (config.max_positions, attention.rope.theta, scaling and scaling.kind, config.norm_eps, biased)
    assert found == ROTARY[name]


def test_v2_and_v3_sharpen_attention_as_their_papers_say() -> None:
    factors = [config_of(f"deepseek-{name}").blocks[0].attention.rope.softmax_factor for name in ("v2", "v3")]
    assert factors[0] == pytest.approx((0.0707 * 3.6888794541 + 1) ** 2)  # ln 40
    assert factors[1] == pytest.approx((0.1 * 3.6888794541 + 1) ** 2)


def test_only_the_first_layers_of_the_large_mixtures_are_dense() -> None:
    for name, count in {"deepseek-moe-16b": 1, "deepseek-v2-lite": 1, "deepseek-v2": 1, "deepseek-v3": 3}.items():
        config = config_of(name)
        assert config.moe_layers == tuple(range(count, len(config.blocks)))


def test_coder_v2_is_v2_and_r1_is_v3() -> None:
    assert config_of("deepseek-coder-v2") == config_of("deepseek-v2")
    assert config_of("deepseek-coder-v2-lite") == config_of("deepseek-v2-lite")
    assert config_of("deepseek-r1") == config_of("deepseek-v3")


@pytest.mark.parametrize("ladder", LADDERS)
def test_rungs_are_of_one_size(ladder: str) -> None:
    sizes = [measure(config_of(f"{ladder}-v{rung}"), PRESETS[f"{ladder}-v{rung}"].seq_len) for rung in (1, 2, 3)]
    for key in ("total_parameters", "active_parameters", "expert_parameters"):
        values = [size.to_dict()[key] for size in sizes]
        assert max(values) / min(values) < 1.01, key
    caches = [size.cache_elements_per_token for size in sizes]
    assert caches[0] > 2 * caches[1] == 2 * caches[2]


@pytest.mark.parametrize("ladder", LADDERS)
def test_rungs_differ_in_what_their_papers_changed(ladder: str) -> None:
    v1, v2, v3 = (config_of(f"{ladder}-v{rung}") for rung in (1, 2, 3))
    layers = [config.blocks[-1].feed_forward for config in (v1, v2, v3)]
    assert [layer.router.kind for layer in layers] == ["softmax_topk", "group_limited", "sigmoid_biased"]
    assert [config.blocks[0].attention.kind for config in (v1, v2, v3)] == ["grouped_query", "latent", "latent"]
    assert v2.blocks[0].attention == v3.blocks[0].attention
    assert [len(config.mtp) for config in (v1, v2, v3)] == [0, 0, 1]
    used = [{name for name, value in layer.balance.model_dump().items() if value} for layer in layers]
    assert used[0] - {"num_devices"} == {"expert"}
    assert used[1] - {"num_devices"} == {"expert", "device", "communication"}
    assert used[2] - {"num_devices"} == {"sequence"}
    same: list[Any] = [
        (c.vocab_size, c.hidden_size, len(c.blocks), c.init_std, c.blocks[0].feed_forward) for c in (v1, v2, v3)
    ]
    assert same[0] == same[1] == same[2]


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_a_rung_runs_forward_and_back(rung: int) -> None:
    config = config_of(f"tiny-v{rung}")
    model = build(config)
    tokens = torch.arange(24).reshape(2, 12)
    output = model(tokens, mtp=bool(config.mtp))
    balance = sum(term for record in output.routing.values() for term in record.balance.values())
    loss = model.logits(output.hidden).float().logsumexp(-1).mean() + balance
    for hidden in output.mtp_hidden:
        loss = loss + model.logits(hidden).float().logsumexp(-1).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
