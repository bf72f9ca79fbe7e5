"""What every entry of every table must satisfy; a new variant is covered by its line there."""

from __future__ import annotations

import typing
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from finemoe.core.config import Config, to_json
from finemoe.methods import METHODS
from finemoe.methods.trainables import TRAINABLES
from finemoe.model.attention import ATTENTIONS
from finemoe.model.backends import ATTENTION_KERNELS, EXPERT_KERNELS
from finemoe.model.config import Kernels, ModelConfig, expand
from finemoe.model.moe.balance import BALANCE_TERMS, BalanceConfig
from finemoe.model.moe.layer import MoELayer
from finemoe.model.moe.routers import ROUTERS
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.model.presets import PRESETS, resolve
from finemoe.model.rope import SCALINGS
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from finemoe.training.optimizers import OPTIMIZERS
from finemoe.training.schedule import SCHEDULES
from oracles.models import GROUPS, LATENT, VOCAB, YARN, build, moe_table, small_config, v3_config

GROUPED_QUERY = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
# The least that each attention and each scaling needs said; a router needs nothing.
ATTENTION_TABLES: dict[str, dict[str, Any]] = {
    "grouped_query": GROUPED_QUERY,
    "latent": {key: value for key, value in LATENT.items() if key not in ("q_lora_rank", "rope")},
}
SCALING_TABLES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "llama3": {"factor": 4.0, "original_max_positions": 16},
    "yarn": {key: value for key, value in YARN.items() if key != "kind"},
}

METHOD_TABLES: dict[str, dict[str, Any]] = {"distill": {"teacher": "runs/teacher"}}
TRAINABLE_TABLES: dict[str, dict[str, Any]] = {
    "names": {"train": ["norms"]},
    "experts": {"selection": "selection.json"},
    "child": {"mode": "F"},
}

CONFIGS = {
    **{f"router {kind}": (kind, config, {}) for kind, (config, _) in ROUTERS.items()},
    **{f"attention {kind}": (kind, config, ATTENTION_TABLES[kind]) for kind, (config, _) in ATTENTIONS.items()},
    **{f"scaling {kind}": (kind, config, SCALING_TABLES[kind]) for kind, config in SCALINGS.items()},
    **{f"schedule {kind}": (kind, config, {}) for kind, (config, _) in SCHEDULES.items()},
    **{f"optimizer {kind}": (kind, config, {"learning_rate": 0.1}) for kind, (config, _) in OPTIMIZERS.items()},
    **{f"method {kind}": (kind, config, METHOD_TABLES.get(kind, {})) for kind, (config, _) in METHODS.items()},
    **{f"trainable {kind}": (kind, config, TRAINABLE_TABLES.get(kind, {})) for kind, (config, _) in TRAINABLES.items()},
}
MODELS = {
    **{f"router {kind}": small_config(feed_forward=moe_table(kind)) for kind in ROUTERS},
    **{
        f"router {kind}, grouped": small_config(feed_forward=moe_table(router={"kind": kind, **GROUPS}))
        for kind, (config, _) in ROUTERS.items()
        if issubclass(config, GroupsConfig)
    },
    **{f"attention {kind}": small_config(attention={"kind": kind, **ATTENTION_TABLES[kind]}) for kind in ATTENTIONS},
    **{
        f"scaling {kind}, {layout}": small_config(
            attention={**GROUPED_QUERY, "rope": {"layout": layout, "scaling": {"kind": kind, **SCALING_TABLES[kind]}}}
        )
        for kind in SCALINGS
        for layout in ("half_split", "interleaved")
    },
    "latent, everything on": small_config(attention=LATENT),
    "biases": small_config(attention={**GROUPED_QUERY, "qkv_bias": True}),
    "half of each head": small_config(attention={**GROUPED_QUERY, "rotary_dim": 4}),
    "norm of each head": small_config(attention={**GROUPED_QUERY, "qk_norm": "head"}),
    "norm of projections": small_config(attention={**GROUPED_QUERY, "qk_norm": "projection", "qkv_bias": True}),
    "gated shared experts": small_config(feed_forward=moe_table(gate_shared_experts=True, num_shared_experts=2)),
    "clamped": small_config(feed_forward=moe_table(swiglu_limit=10.0)),
    "V3": v3_config(),
    "V3, tied": v3_config(tie_embeddings=True, mtp_depth=1),
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


def count(module: nn.Module) -> int:
    """Parameters, and the biases of routers: no gradient moves them, and checkpoints hold them with the weights."""
    biases = [value for name, value in module.named_buffers() if name.endswith("selection_bias")]
    return sum(value.numel() for value in (*module.parameters(), *biases))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_counted_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    size = measure(config, 16)
    total, ahead = count(model) - count(model.mtp), count(model.mtp)
    assert ahead == size.mtp_parameters
    idle = experts = 0
    for layer in (block.feed_forward for block in model.blocks):
        experts += count(layer)
        if isinstance(layer, MoELayer):
            experts -= count(layer.router) + (0 if layer.shared_gate is None else count(layer.shared_gate))
            each = count(layer.experts) // layer.config.num_routed_experts
            idle += each * (layer.config.num_routed_experts - layer.config.experts_per_token)
    assert size.total_parameters == total
    assert size.active_parameters == total - idle
    assert (size.expert_parameters, size.active_expert_parameters) == (experts, experts - idle)


@pytest.mark.parametrize("name", [*(f"attention {kind}" for kind in ATTENTIONS), "latent, everything on", "V3"])
def test_counted_cache_is_that_of_the_built_one(name: str) -> None:
    config = MODELS[name]
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
    output = model(tokens, mtp=True)
    sum(model.logits(h).logsumexp(-1).square().sum() for h in (output.hidden, *output.mtp_hidden)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
        if parameter.dim() == 3:  # stacked experts: each that saw a token learns
            part, index = key.split(".")[:2]
            layer = int(index) + (len(model.blocks) if part == "mtp" else 0)
            assert torch.equal(parameter.grad.flatten(1).any(1), output.routing[layer].load > 0), key


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_learns_if_it_says_so(kind: str) -> None:
    config, router = ROUTERS[kind]
    built: nn.Module = build(MODELS[f"router {kind}"]).blocks[1].feed_forward.router
    assert isinstance(built, router)
    assert any(True for _ in built.parameters()) == config.learned  # type: ignore[attr-defined]
    assert count(built) == config().num_parameters(16, 6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_has_a_bias_if_it_says_so_and_resets_what_it_holds(kind: str) -> None:
    config, _ = ROUTERS[kind]
    router: Any = build(MODELS[f"router {kind}"]).blocks[1].feed_forward.router
    held = dict(router.named_buffers())
    assert ("selection_bias" in held) == config.selects_with_bias  # type: ignore[attr-defined]
    if config.selects_with_bias:  # type: ignore[attr-defined]
        assert held["selection_bias"].shape == (6,)
    for value in held.values():
        value.fill_(77)
    router.reset(torch.Generator().manual_seed(1), None)
    first = {name: value.clone() for name, value in held.items()}
    assert not any((value == 77).any() for value in first.values())
    router.reset(torch.Generator().manual_seed(1), None)
    assert all(torch.equal(value, first[name]) for name, value in held.items())


@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_sum_to_one_if_the_router_says_so(kind: str) -> None:
    config, _ = ROUTERS[kind]
    record = build(MODELS[f"router {kind}"])(torch.randint(VOCAB, (2, 6)), record=True).routing[1]
    sums = record.decision.scores.sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) == config.scores_sum_to_one  # type: ignore[attr-defined]
    assert (record.decision.scores >= 0).all()
    assert (record.decision.logits is None) == (not config.learned)  # type: ignore[attr-defined]


SUMMING = {"expert", "device", "communication"}  # losses over scores that sum to 1


@pytest.mark.parametrize(
    ("term", "kind"),
    [
        (term, kind)
        for term in BALANCE_TERMS
        for kind, (config, _) in ROUTERS.items()
        if config.learned and (config.scores_sum_to_one or term not in SUMMING)  # type: ignore[attr-defined]
    ],
)
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


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_small_presets_run(name: str) -> None:
    model = build(MODELS[name])
    with torch.no_grad():
        output = model(torch.randint(model.config.vocab_size, (2, 16)), mtp=True)
        logits = model.logits(output.hidden)
    assert logits.shape == (2, 16, model.config.vocab_size)
    assert logits.isfinite().all()
    assert all(state.isfinite().all() for state in output.mtp_hidden)
    for layer in model.config.moe_layers:
        assert output.routing[layer].load.sum() == 32 * model.config.blocks[layer].feed_forward.experts_per_token


def test_some_presets_are_small_enough_to_run() -> None:
    assert {"tiny-dense", "tiny-moe"} <= set(SMALL_PRESETS)
