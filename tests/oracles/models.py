"""Small models for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finemoe.model.config import Kernels, ModelConfig, ModelRecipe, expand
from finemoe.model.initialize import initialize
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.moe.layer import MoELayer
from finemoe.model.transformer import Transformer

VOCAB = 23

YARN = {"kind": "yarn", "factor": 8.0, "original_max_positions": 16, "beta_fast": 4.0, "mscale_all_dim": 1.0}
"""Edges within the few components of a small head, and a softmax scale that differs."""

LATENT: dict[str, Any] = {
    "kind": "latent",
    "num_heads": 3,
    "q_lora_rank": 6,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "rope": {"layout": "interleaved", "scaling": YARN},
}
"""Latent attention with everything on, and no two widths alike."""

GROUPS: dict[str, Any] = {"num_groups": 3, "groups_per_token": 2}


def moe_table(kind: str = "softmax_topk", **changes: Any) -> dict[str, Any]:
    """An MoE layer's configuration as a recipe writes it."""
    layer = {"kind": "moe", "num_routed_experts": 6, "experts_per_token": 2, "expert_hidden_size": 8}
    return {**layer, "num_shared_experts": 1, "router": {"kind": kind}, **changes}


def small_config(**changes: Any) -> ModelConfig:
    """Two layers, the first of them dense; weights large enough for attention and routing to matter."""
    recipe = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "feed_forward": moe_table(),
        "leading": {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": 24}},
        "init_std": 0.3,
    }
    return expand(ModelRecipe.model_validate({**recipe, **changes}))


def v3_config(**changes: Any) -> ModelConfig:
    """DeepSeek-V3 in miniature: latent attention, biased sigmoid gates in groups, two prediction modules."""
    router = {"kind": "sigmoid_biased", "route_scale": 2.5, **GROUPS}
    feed_forward = moe_table(router=router, balance={"sequence": 0.1})
    return small_config(**{"attention": LATENT, "feed_forward": feed_forward, "mtp_depth": 2, **changes})


def build(config: ModelConfig, seed: int = 0, **kernels: Any) -> Transformer:
    """A model with drawn weights; balanced hash tables see an even text."""
    model = Transformer(config, Kernels(**kernels))
    initialize(model, seed, token_frequencies=lambda: torch.ones(config.vocab_size, dtype=torch.int64))
    return model


def decision_of(expert_ids: Tensor, num_experts: int, gates: Tensor | None = None) -> RoutingDecision:
    """A router's decision for these experts `[tokens, k]`, with weights of 1 unless others are given."""
    scores = torch.zeros(len(expert_ids), num_experts, device=expert_ids.device)
    return RoutingDecision(expert_ids, torch.ones(expert_ids.shape) if gates is None else gates, scores, None)


def moe_layer(table: dict[str, Any], seed: int = 0, experts: str = "sorted_slices") -> MoELayer:
    """One drawn MoE layer of a hidden size of 16."""
    model = build(small_config(num_layers=1, leading=None, feed_forward=table), seed, experts=experts)
    layer = model.blocks[0].feed_forward
    assert isinstance(layer, MoELayer)
    return layer
