"""Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a sigmoid gate, and layers that may be dense."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import no_window, read_grouped, the_grouped, write_grouped
from finemoe.checkpoint.huggingface.keys import Spellings
from finemoe.checkpoint.huggingface.layers import read_listed, refuse_mtp, write_listed
from finemoe.checkpoint.huggingface.routing import made_of_experts, read_softmax_moe
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    no_window(fields)
    bias = fields.flag("qkv_bias")
    fields.idle("attention_bias", bias)
    attention = read_grouped(fields, bias=bias)
    width, shared = fields.integer("moe_intermediate_size"), fields.integer("shared_expert_intermediate_size")
    if shared % width:
        fields.refuse(
            "shared_expert_intermediate_size", shared, f"it must be a multiple of moe_intermediate_size {width}"
        )
    more = {"num_shared_experts": shared // width, "gate_shared_experts": True}
    return read_listed(
        fields, attention, read_softmax_moe(fields, "num_experts", width, fields.flag("norm_topk_prob"), **more)
    )


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention = the_grouped(config, bias=None)
    plain, moe, router = made_of_experts(config, shared=True, gated=True)
    return {
        **write_grouped(config, attention, max_positions),
        **write_listed(config, plain, moe),
        "head_dim": attention.head_dim,
        "norm_topk_prob": router.normalize_gates,
        "num_experts": moe.num_routed_experts,
        "qkv_bias": attention.qkv_bias,
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.expert_hidden_size,
        "use_sliding_window": False,
    }


FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read,
    _write,
    defaults={
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32768,
        "mlp_only_layers": None,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
    },
    spellings=Spellings(shared="shared_expert"),
    switches={"qkv_bias": "self_attn.q_proj.bias"},
)
