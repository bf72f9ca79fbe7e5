"""Qwen3-MoE: no shared expert, norms on each head's query and key, and layers that may be dense."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import always_normed, no_window, read_grouped, the_grouped, write_grouped
from finemoe.checkpoint.huggingface.layers import read_listed, refuse_mtp, write_listed
from finemoe.checkpoint.huggingface.routing import made_of_experts, read_softmax_moe
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    no_window(fields)
    always_normed(fields)
    # Qwen3-Coder names two settings of Qwen2-MoE, which this family's code never looks at.
    fields.idle("qkv_bias", False)
    fields.idle("shared_expert_intermediate_size", 0)
    attention = read_grouped(fields, norm="head")
    experts = "num_experts" if fields.has("num_experts") or not fields.has("num_local_experts") else "num_local_experts"
    width, normalize = fields.integer("moe_intermediate_size"), fields.flag("norm_topk_prob")
    return read_listed(fields, attention, read_softmax_moe(fields, experts, width, normalize))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention = the_grouped(config, norm="head")
    plain, moe, router = made_of_experts(config)
    return {
        **write_grouped(config, attention, max_positions),
        **write_listed(config, plain, moe),
        "attention_bias": False,
        "head_dim": attention.head_dim,
        "norm_topk_prob": router.normalize_gates,
        "num_experts": moe.num_routed_experts,
        "use_sliding_window": False,
    }


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read,
    _write,
    defaults={
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32768,
        "mlp_only_layers": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    },
)
