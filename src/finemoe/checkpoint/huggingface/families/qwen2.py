"""Qwen2 and Qwen2.5, dense: Llama with biases on queries, keys and values; also R1's Qwen distillations."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import (
    all_dense,
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
    fields.idle("attention_bias", True)  # what the family always has, under the name of others
    fields.idle("qkv_bias", True)
    return uniform(fields, read_grouped(fields, bias=True), dense(fields.integer("intermediate_size")))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention, plain = the_grouped(config, bias=True), all_dense(config)
    return {
        **write_grouped(config, attention, max_positions),
        "head_dim": attention.head_dim,
        "intermediate_size": plain.ffn_hidden_size,
        "use_sliding_window": False,
    }


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
)
