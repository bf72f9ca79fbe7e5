"""Whole models on a CUDA device beside the same on the CPU, in float32. Run with `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.transformer import Transformer
from oracles.models import VOCAB, build, moe_table, small_config, v3_config

pytestmark = pytest.mark.gpu

BATCH, SEQ = 2, 12
MODELS: dict[str, ModelConfig] = {
    "V3": v3_config(),
    "grouped-query": small_config(),
    "dropping": small_config(feed_forward=moe_table(capacity_factor=0.5, balance={"expert": 0.1, "z": 0.1})),
    "hash": small_config(feed_forward=moe_table("hash_layer")),
}
EVERY = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def on(device: str, config: ModelConfig, **kernels: Any) -> Transformer:
    return build(config, **kernels).to(device)


def loss_of(model: Transformer, ids: Tensor, documents: Tensor) -> Tensor:
    output = model(ids, documents=documents, mtp=bool(model.mtp))
    targets, weights = ids.flatten(), torch.ones(ids.numel(), device=ids.device)
    loss = model.backend.cross_entropy_sum(output.hidden.flatten(0, 1), model.head_weight, targets, weights)
    for ahead in output.mtp_hidden:
        loss = loss + model.logits(ahead).float().logsumexp(-1).square().sum()
    return loss + sum(sum(record.balance.values()) for record in output.routing.values())


@EVERY
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_gradients_and_load_are_those_of_the_cpu(config: ModelConfig, recompute: bool) -> None:
    ids, documents = (
        torch.randint(VOCAB, (BATCH, SEQ)),
        torch.arange(SEQ).div(5, rounding_mode="floor").expand(BATCH, -1),
    )
    results = []
    for device in ("cpu", "cuda"):
        model = on(device, config, recompute=recompute).train()
        loss = loss_of(model, ids.to(device), documents.to(device))
        loss.backward()
        results.append((loss.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], gradient, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@EVERY
@pytest.mark.parametrize("width", [1, 5])
def test_cached_is_uncached(config: ModelConfig, width: int) -> None:
    model = on("cuda", config).eval()
    ids = torch.randint(VOCAB, (BATCH, SEQ)).cuda()
    with torch.no_grad():
        whole, cache, parts = model(ids).hidden, model.new_cache(BATCH, SEQ), []
        for start in range(0, SEQ, width):
            piece = ids[:, start : start + width]
            positions = torch.arange(start, start + piece.shape[1], device="cuda").expand_as(piece)
            parts.append(model(piece, positions=positions, cache=cache).hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_a_layer_in_which_all_is_dropped_keeps_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "finemoe.model.moe.layer.kept_assignments", lambda ids, *others: torch.zeros_like(ids, dtype=torch.bool)
    )
    for experts in ("auto", "grouped_mm", "sorted_slices", "loop"):
        model = on("cuda", MODELS["dropping"], experts=experts).train()
        with torch.autocast("cuda", torch.bfloat16):
            output = model(torch.randint(VOCAB, (BATCH, SEQ)).cuda())
        output.hidden.float().sum().backward()
        for record in output.routing.values():
            assert record.load.sum() == record.dropped
        for layer in model.moe_layers.values():
            for parameter in layer.experts.parameters():
                assert parameter.grad is not None
                assert not parameter.grad.any()


def test_constraints_hold() -> None:
    model, ids = on("cuda", MODELS["grouped-query"]).eval(), torch.randint(VOCAB, (BATCH, SEQ)).cuda()
    allowed = (torch.arange(6) % 2 == 0).cuda()
    constraint = {layer: RoutingConstraint(allowed=allowed) for layer in model.moe_layers}
    with torch.no_grad():
        routing = model(ids, constraint=constraint).routing
    assert all(not record.load[1::2].any() for record in routing.values())
