"""The forward path as a whole: shapes, heads, refusals, recomputation, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.backends import ATTENTION_KERNELS, EXPERT_KERNELS
from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.transformer import Transformer
from oracles.models import GROUPS, LATENT, VOCAB, build, moe_table, small_config, v3_config

CONFIGS = {"DeepSeekMoE": small_config(), "V3": v3_config(mtp_depth=0)}


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def loss_and_gradients(model: Transformer, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(ids)
    balance = sum(sum(record.balance.values()) for record in output.routing.values())
    loss = model.logits(output.hidden).logsumexp(-1).square().sum() + balance
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_routing_is_reported_for_moe_layers_only() -> None:
    config = small_config(num_layers=3)
    output = build(config)(tokens(2, 5))
    assert output.hidden.shape == (2, 5, 16)
    assert set(output.routing) == set(config.moe_layers) == {1, 2}


def test_forward_changes_nothing_in_the_model() -> None:
    model = build(small_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(tokens(2, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_head_is_the_embedding() -> None:
    model = build(small_config(tie_embeddings=True))
    hidden = torch.randn(3, 16)
    assert model.head is None
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


def test_untied_head_is_its_own_matrix() -> None:
    model = build(small_config())
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head.weight.T)
    assert not torch.equal(model.head.weight, model.embedding.weight)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_documents_and_cache_exclude_each_other(config: ModelConfig) -> None:
    model = build(config)
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens(1, 3), documents=torch.zeros(1, 3), cache=model.new_cache(1, 3))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_token_sees_the_future(config: ModelConfig) -> None:
    model, ids = build(config), tokens(2, 6)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before, after = model(ids).hidden, model(changed).hidden
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_constraint_reaches_its_own_layer_only() -> None:
    model, ids = build(small_config(num_layers=3)), tokens(2, 6)
    only_four = RoutingConstraint(allowed=torch.arange(6) == 4, num_active=1)
    routing = model(ids, constraint={2: only_four}).routing
    assert routing[2].load.tolist() == [0, 0, 0, 0, 12, 0]
    assert routing[1].load.sum() == 24


def test_decision_is_recorded_on_request_only() -> None:
    model, ids = build(small_config()), tokens(1, 4)
    assert model(ids).routing[1].decision is None
    assert model(ids, record=True).routing[1].decision.expert_ids.shape == (4, 2)


def test_replaying_a_recorded_decision_repeats_the_output() -> None:
    model, ids = build(small_config()), tokens(2, 4)
    first = model(ids, record=True)
    replay = {layer: RoutingConstraint(replay=r.decision.expert_ids) for layer, r in first.routing.items()}
    assert torch.equal(model(ids, constraint=replay).hidden, first.hidden)


RECOMPUTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "capacity": {"capacity_factor": 0.5},
    "balance": {"balance": {"expert": 0.1, "z": 0.1}},
    "V2": {
        "router": {"kind": "group_limited", **GROUPS},
        "balance": {"communication": 0.1, "num_devices": 3},
        "capacity_factor": 0.5,
        "capacity_level": "device",
        "capacity_exempt": 0.5,
    },
    "V4": {
        "router": {"kind": "sigmoid_biased", "score_function": "sqrtsoftplus"},
        "balance": {"sequence": 0.1},
        "swiglu_limit": 0.5,
        "gate_shared_experts": True,
    },
}


@pytest.mark.parametrize("changes", RECOMPUTED.values(), ids=RECOMPUTED)
@pytest.mark.parametrize("experts", EXPERT_KERNELS)
def test_recomputation_changes_no_bit(changes: dict[str, Any], experts: str) -> None:
    config, ids = small_config(attention=LATENT, feed_forward=moe_table(**changes)), tokens(4, 6)
    loss, plain = loss_and_gradients(build(config, experts=experts), ids)
    again, recomputed = loss_and_gradients(build(config, experts=experts, recompute=True), ids)
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("attention", ATTENTION_KERNELS)
@pytest.mark.parametrize("experts", EXPERT_KERNELS)
def test_every_pair_of_kernels_computes_the_same(attention: str, experts: str, config: ModelConfig) -> None:
    ids = tokens(2, 6)
    loss, expected = loss_and_gradients(build(config, attention="reference", experts="loop"), ids)
    other, found = loss_and_gradients(build(config, attention=attention, experts=experts), ids)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("cached", [False, True])
def test_bfloat16_autocast_tracks_float32(cached: bool, config: ModelConfig) -> None:
    # Routing is held to the float32 choice: a near tie may rightly fall the other way here.
    model, ids = build(config), tokens(2, 6)
    with torch.no_grad():
        exact = model(ids, record=True)
        replay = {layer: RoutingConstraint(replay=r.decision.expert_ids) for layer, r in exact.routing.items()}
        with torch.autocast("cpu", torch.bfloat16):
            cache = model.new_cache(2, 6) if cached else None
            rounded = model(ids, constraint=replay, cache=cache)
    assert (rounded.hidden - exact.hidden).norm() < 0.03 * exact.hidden.norm()


# DeepSeek-V4's first step: the bottom layers route by hash, the others by biased sqrtsoftplus; clamped throughout.
V4 = small_config(
    num_layers=4,
    attention=LATENT,
    leading={"count": 2, "feed_forward": moe_table("hash_layer", swiglu_limit=0.5)},
    feed_forward=moe_table(
        router={"kind": "sigmoid_biased", "score_function": "sqrtsoftplus", "route_scale": 1.5},
        balance={"sequence": 0.1},
        swiglu_limit=0.5,
    ),
)


def test_first_layers_may_route_by_hash_and_the_others_by_score() -> None:
    model, ids = build(V4), tokens(3, 7)
    loss, gradients = loss_and_gradients(model, ids)
    output = model(ids, record=True)
    assert loss.isfinite()
    assert set(output.routing) == {0, 1, 2, 3}
    for layer in (0, 1):
        table = model.blocks[layer].feed_forward.router.expert_of_token
        assert torch.equal(output.routing[layer].decision.expert_ids, table[ids.flatten()])
        assert not output.routing[layer].balance
    for layer in (2, 3):
        decision = output.routing[layer].decision
        torch.testing.assert_close(decision.scores, torch.log(1 + torch.exp(decision.logits)).sqrt())
        torch.testing.assert_close(decision.gate_weights.sum(1), torch.full((21,), 1.5))
        assert set(output.routing[layer].balance) == {"sequence"}
        assert gradients[f"blocks.{layer}.feed_forward.router.weight"].any()
    assert not [name for name in gradients if name.startswith(("blocks.0", "blocks.1")) and "router" in name]


def test_clamp_reaches_every_expert_and_the_shared_one() -> None:
    model, ids = build(V4), tokens(3, 7)
    limits = [b.feed_forward.experts.limit for b in model.blocks]
    limits += [b.feed_forward.shared_experts.limit for b in model.blocks]
    assert set(limits) == {0.5}
    table = V4.model_dump()
    for block in table["blocks"]:
        block["feed_forward"]["swiglu_limit"] = None
    free = build(ModelConfig.model_validate(table))
    free.load_state_dict(model.state_dict())
    assert not torch.allclose(free(ids).hidden, model(ids).hidden)
