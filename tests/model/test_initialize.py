"""First weights: by name, by seed, of the configured width."""

from __future__ import annotations

import pytest
import torch

from finemoe.model.config import ModelConfig
from finemoe.model.initialize import initialize
from finemoe.model.norm import RMSNorm
from oracles.models import build, moe_table, small_config, v3_config

ARMS = {
    "dense": small_config(num_layers=3, feed_forward={"kind": "dense", "ffn_hidden_size": 24}),
    "softmax": small_config(num_layers=3),
    "hash": small_config(num_layers=3, feed_forward=moe_table("hash_layer")),
    "groups": small_config(num_layers=3, feed_forward=moe_table("group_limited")),
    "V3": v3_config(num_layers=3, attention={"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qk_norm": "head"}),
    "more experts": small_config(num_layers=3, feed_forward=moe_table(num_routed_experts=12)),
}


@pytest.mark.parametrize("other", [name for name in ARMS if name != "softmax"])
def test_tensors_of_one_name_and_shape_start_equal_in_different_arms(other: str) -> None:
    first, second = build(ARMS["softmax"], 5).state_dict(), build(ARMS[other], 5).state_dict()
    shared = [name for name in first if name in second and first[name].shape == second[name].shape]
    assert {"embedding.weight", "head.weight", "blocks.2.attention.q_proj.weight"} <= set(shared)
    assert all(torch.equal(first[name], second[name]) for name in shared)


@pytest.mark.parametrize("config", ARMS.values(), ids=ARMS)
def test_same_seed_same_weights_other_seed_other_weights(config: ModelConfig) -> None:
    first, again, other = (build(config, seed) for seed in (3, 3, 4))
    for (name, a), b, c in zip(
        first.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == ("norm" in name or "bias" in name), name


def test_the_state_of_the_global_generator_does_not_matter() -> None:
    first = build(ARMS["softmax"]).state_dict()
    torch.rand(7)
    assert all(torch.equal(value, first[name]) for name, value in build(ARMS["softmax"]).state_dict().items())


@pytest.mark.parametrize("std", [0.006, 0.05])
def test_weights_are_normal_with_the_configured_deviation_and_norms_are_one(std: float) -> None:
    model = build(small_config(hidden_size=64, vocab_size=512, init_std=std))
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) == 5
    for name, parameter in model.named_parameters():
        if name in norms:
            assert (parameter == 1).all(), name
        else:
            # 5 standard errors: std of the mean is std / sqrt(n), of the deviation std / sqrt(2 n).
            error = 5 * std / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < error, name
            assert parameter.std().item() == pytest.approx(std, abs=error), name


def test_no_two_tensors_of_one_shape_start_equal() -> None:
    weights = [(n, p) for n, p in build(ARMS["softmax"]).named_parameters() if "norm" not in n]
    for i, (name, value) in enumerate(weights):
        for other, compared in weights[:i]:
            assert value.shape != compared.shape or not torch.equal(value, compared), (name, other)


def test_selection_biases_start_at_zero() -> None:
    router = build(ARMS["V3"]).blocks[1].feed_forward.router
    assert torch.equal(router.selection_bias, torch.zeros(6))


@pytest.mark.parametrize("table", ["random", "balanced"])
def test_hash_tables_differ_by_layer_and_by_seed(table: str) -> None:
    config = small_config(num_layers=4, feed_forward=moe_table(router={"kind": "hash_layer", "table": table}))
    tables = [build(config, seed).blocks[i].feed_forward.router.expert_of_token for seed in (0, 1) for i in (1, 2, 3)]
    assert not any(torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])


@pytest.mark.parametrize("arm", ["hash", "V3"])
def test_whatever_was_there_before_is_overwritten(arm: str) -> None:
    model = build(ARMS[arm], 3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.fill_(1_000_000)
    initialize(model, 3)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
