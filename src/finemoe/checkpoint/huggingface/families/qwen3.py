"""Qwen3, dense: Llama with norms on each head's query and key."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import (
    all_dense,
    always_normed,
    no_window,
    read_grouped,
    the_grouped,
    uniform,
    write_grouped,
)
from finemoe.checkpoint.huggingface.layers import dense, refuse_mtp
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    no_window(fields)
    always_normed(fields)
    return uniform(fields, read_grouped(fields, norm="head"), dense(fields.integer("intermediate_size")))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention, plain = the_grouped(config, norm="head"), all_dense(config)
    return {
        **write_grouped(config, attention, max_positions),
        "attention_bias": False,
        "head_dim": attention.head_dim,
        "intermediate_size": plain.ffn_hidden_size,
        "use_sliding_window": False,
    }


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _read,
    _write,
    defaults={"head_dim": 128, "max_position_embeddings": 32768, "num_key_value_heads": 32},
)
