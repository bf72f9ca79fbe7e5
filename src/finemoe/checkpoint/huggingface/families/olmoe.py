"""OLMoE: every layer routes; norms over all heads' queries, and keys, together."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import always_normed, read_grouped, the_grouped, uniform, write_grouped
from finemoe.checkpoint.huggingface.layers import refuse_mtp
from finemoe.checkpoint.huggingface.routing import made_of_experts, read_softmax_moe
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    always_normed(fields)
    attention = read_grouped(fields, norm="projection", own_head_dim=False)
    normalize = fields.flag("norm_topk_prob")
    return uniform(
        fields, attention, read_softmax_moe(fields, "num_experts", fields.integer("intermediate_size"), normalize)
    )


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention = the_grouped(config, norm="projection", own_head_dim=False)
    plain, moe, router = made_of_experts(config)
    if plain is not None:
        raise CheckpointError("it has dense layers, and all of the family's route")
    return {
        **write_grouped(config, attention, max_positions),
        "attention_bias": False,
        "intermediate_size": moe.expert_hidden_size,
        "norm_topk_prob": router.normalize_gates,
        "num_experts": moe.num_routed_experts,
        "num_experts_per_tok": moe.experts_per_token,
    }


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
)
