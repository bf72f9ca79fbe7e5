"""Mixtral: every layer routes, and the gates are normalised."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import read_grouped, the_grouped, uniform, write_grouped
from finemoe.checkpoint.huggingface.keys import Spellings
from finemoe.checkpoint.huggingface.layers import refuse_mtp
from finemoe.checkpoint.huggingface.routing import made_of_experts, read_softmax_moe
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    window, positions = fields.optional_integer("sliding_window"), fields.integer("max_position_embeddings")
    if window is not None and window < positions:
        fields.refuse("sliding_window", window, "finemoe has no sliding-window attention")
    layer = read_softmax_moe(fields, "num_local_experts", fields.integer("intermediate_size"), normalize=True)
    return uniform(fields, read_grouped(fields), layer)


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention = the_grouped(config)
    plain, moe, router = made_of_experts(config)
    if plain is not None:
        raise CheckpointError("it has dense layers, and all of the family's route")
    if not router.normalize_gates:
        raise CheckpointError("its gates are not normalised, and the family's are")
    return {
        **write_grouped(config, attention, max_positions),
        "head_dim": attention.head_dim,
        "intermediate_size": moe.expert_hidden_size,
        "num_experts_per_tok": moe.experts_per_token,
        "num_local_experts": moe.num_routed_experts,
        "sliding_window": None,
    }


FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    spellings=Spellings("block_sparse_moe", "w1", "w3", "w2"),
)
