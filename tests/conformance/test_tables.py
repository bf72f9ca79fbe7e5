"""What every entry of every table must satisfy; a new variant is covered by its line there."""

from __future__ import annotations

import typing
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from finemoe.core.config import Config, to_json
from finemoe.model.attention import ATTENTIONS
from finemoe.model.attention.kernels import ATTENTION_KERNELS
from finemoe.model.config import Kernels, ModelConfig, expand
from finemoe.model.moe.balance import BALANCE_TERMS, BalanceConfig
from finemoe.model.moe.experts import EXPERT_KERNELS
from finemoe.model.moe.layer import MoELayer
from finemoe.model.moe.routers import ROUTERS
from finemoe.model.presets import PRESETS, resolve
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from oracles.models import VOCAB, build, moe_table, small_config

# The least that each attention needs said; a router needs nothing.
ATTENTION_TABLES: dict[str, dict[str, Any]] = {"grouped_query": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}}

CONFIGS = {
    **{f"router {kind}": (kind, config, {}) for kind, (config, _) in ROUTERS.items()},
    **{f"attention {kind}": (kind, config, ATTENTION_TABLES[kind]) for kind, (config, _) in ATTENTIONS.items()},
}
MODELS = {
    **{f"router {kind}": small_config(feed_forward=moe_table(kind)) for kind in ROUTERS},
    **{f"attention {kind}": small_config(attention={"kind": kind, **ATTENTION_TABLES[kind]}) for kind in ATTENTIONS},
    "tied": small_config(tie_embeddings=True),
    "shared experts 0": small_config(feed_forward=moe_table(num_shared_experts=0)),
    "shared experts 2": small_config(feed_forward=moe_table(num_shared_experts=2)),
    **{name: expand(resolve({"preset": name}, name)) for name in PRESETS},
}
SMALL_PRESETS = [name for name in PRESETS if measure(MODELS[name], 8).total_parameters < 20e6]


@pytest.mark.parametrize(("kind", "config", "fields"), CONFIGS.values(), ids=CONFIGS)
def test_kind_is_the_key_of_the_table(kind: str, config: type[Config], fields: dict[str, Any]) -> None:
    assert get_args(config.model_fields["kind"].annotation) == (kind,)
    assert config(**fields).kind == kind  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "config", "fields"), CONFIGS.values(), ids=CONFIGS)
def test_configuration_is_frozen_and_closed(kind: str, config: type[Config], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config(**fields).kind = "other"  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="Extra inputs"):
        config(**fields, no_such_field=1)


@pytest.mark.parametrize(("kind", "config", "fields"), CONFIGS.values(), ids=CONFIGS)
def test_configuration_survives_json(kind: str, config: type[Config], fields: dict[str, Any]) -> None:
    value = config(**fields)
    assert config.model_validate_json(to_json(value)) == value


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_model_survives_json_and_hashes(config: ModelConfig) -> None:
    again = ModelConfig.model_validate_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counted_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    size = measure(config, 16)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = experts = 0
    for module in model.modules():
        if isinstance(module, MoELayer):
            stacked = sum(p.numel() for p in module.experts.parameters())
            each = stacked // module.config.num_routed_experts
            idle += each * (module.config.num_routed_experts - module.config.experts_per_token)
            experts += sum(p.numel() for name, p in module.named_parameters() if not name.startswith("router."))
    experts += sum(
        p.numel() for b in model.blocks for p in b.feed_forward.parameters() if not isinstance(b.feed_forward, MoELayer)
    )
    assert size.total_parameters == total
    assert size.active_parameters == total - idle
    assert (size.expert_parameters, size.active_expert_parameters) == (experts, experts - idle)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_counted_cache_is_that_of_the_built_one(kind: str) -> None:
    config = MODELS[f"attention {kind}"]
    cache = build(config).new_cache(1, 7)
    tensors = [value for layer in cache for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in tensors) == 7 * measure(config, 16).cache_elements_per_token


@pytest.mark.parametrize(("field", "table"), [("attention", ATTENTION_KERNELS), ("experts", EXPERT_KERNELS)])
def test_kernel_names_are_those_of_the_table(field: str, table: dict[str, Any]) -> None:
    assert set(get_args(typing.get_type_hints(Kernels)[field])) == set(table)


def test_balance_coefficients_are_the_terms_and_off_by_default() -> None:
    assert set(BalanceConfig.model_fields) - {"num_devices"} == set(BALANCE_TERMS)
    assert all(getattr(BalanceConfig(), name) == 0 for name in BALANCE_TERMS)


@pytest.mark.parametrize("attention", ATTENTION_KERNELS)
@pytest.mark.parametrize("experts", EXPERT_KERNELS)
@pytest.mark.parametrize("name", [name for name in MODELS if name not in PRESETS])
def test_gradient_reaches_every_parameter(name: str, experts: str, attention: str) -> None:
    model = build(MODELS[name], experts=experts, attention=attention)
    tokens = torch.arange(2 * VOCAB).remainder(VOCAB).view(2, VOCAB)  # every token id, so every row of the embedding
    output = model(tokens)
    model.logits(output.hidden).logsumexp(-1).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
        if parameter.dim() == 3:  # stacked experts: each that saw a token learns
            layer = int(key.split(".")[1])
            assert torch.equal(parameter.grad.flatten(1).any(1), output.routing[layer].load > 0), key


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_learns_if_it_says_so(kind: str) -> None:
    config, router = ROUTERS[kind]
    built: nn.Module = build(MODELS[f"router {kind}"]).blocks[1].feed_forward.router
    assert isinstance(built, router)
    assert any(True for _ in built.parameters()) == config.learned  # type: ignore[attr-defined]
    assert sum(p.numel() for p in built.parameters()) == config().num_parameters(16, 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [kind for kind, (config, _) in ROUTERS.items() if config.learned])  # type: ignore[attr-defined]
@pytest.mark.parametrize("term", BALANCE_TERMS)
def test_balance_loss_teaches_the_router_and_not_the_experts(term: str, kind: str) -> None:
    balance = {term: 1.0, "num_devices": 2}
    model = build(small_config(feed_forward=moe_table(kind, balance=balance)))
    output = model(torch.randint(VOCAB, (2, 6)))
    assert set(output.routing[1].balance) == {term}
    output.routing[1].balance[term].backward()
    layer = model.blocks[1].feed_forward
    assert layer.router.weight.grad.any()
    assert all(p.grad is None for p in layer.experts.parameters())
    assert model.embedding.weight.grad.any()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_what_it_is(name: str) -> None:
    preset, config = PRESETS[name], MODELS[name]
    assert preset.summary
    assert preset.seq_len > 0
    widths = {getattr(b.feed_forward, "expert_hidden_size", None) for b in config.blocks}
    widths |= {getattr(b.feed_forward, "ffn_hidden_size", None) for b in config.blocks}
    for built, published in preset.unrounded.items():
        assert 0 < built - published < 64 or built in widths
        assert abs(built / published - 1) < 0.04


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].summary[0].isdigit()])
def test_size_in_the_summary_is_the_counted_one(name: str) -> None:
    total = measure(MODELS[name], 16).total_parameters / 1e6
    printed = PRESETS[name].summary.split("M")[0]
    assert printed == (f"{total:.1f}" if total < 9.9 else f"{total:.0f}")


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_small_presets_run(name: str) -> None:
    model = build(MODELS[name])
    with torch.no_grad():
        output = model(torch.randint(model.config.vocab_size, (2, 16)))
        logits = model.logits(output.hidden)
    assert logits.shape == (2, 16, model.config.vocab_size)
    assert logits.isfinite().all()
    assert all(record.load.sum() == 32 * record.load.new_tensor(7) for record in output.routing.values())


def test_some_presets_are_small_enough_to_run() -> None:
    assert {"tiny-dense", "tiny-moe"} <= set(SMALL_PRESETS)
