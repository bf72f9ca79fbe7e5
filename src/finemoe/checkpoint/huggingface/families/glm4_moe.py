"""GLM-4.5, 4.5-Air, 4.6 and 4.7: half of each head has positions; DeepSeek-V3's router and prediction modules."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import read_grouped, the_grouped, write_grouped
from finemoe.checkpoint.huggingface.layers import read_leading, renamed, write_leading
from finemoe.checkpoint.huggingface.routing import read_biased, write_biased
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    attention = read_grouped(
        fields,
        bias=fields.flag("attention_bias"),
        norm="head" if fields.flag("use_qk_norm") else "none",
        rotary_share=0.5,
    )
    num_mtp = renamed(fields, "num_nextn_predict_layers", "num_mtp_layers")
    return read_leading(fields, attention, read_biased(fields), num_mtp=num_mtp)


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    attention = the_grouped(config, bias=None, norm=None)
    if attention.qk_norm == "projection":
        raise CheckpointError("qk_norm is 'projection', and the family's 'head' or 'none'")
    layers, moe = write_leading(config)
    return {
        **write_grouped(config, attention, max_positions),
        **layers,
        **({} if moe is None else write_biased(moe)),
        "attention_bias": attention.qkv_bias,
        "head_dim": attention.head_dim,
        "num_nextn_predict_layers": len(config.mtp),
        "partial_rotary_factor": attention.turning / attention.head_dim,
        "use_qk_norm": attention.qk_norm == "head",
    }


FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _read,
    _write,
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131_072,
        "n_group": 1,
        "norm_topk_prob": True,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
    modules=True,
    switches={"attention_bias": "self_attn.q_proj.bias", "use_qk_norm": "self_attn.q_norm.weight"},
)
