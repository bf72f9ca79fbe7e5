"""Llama: also DeepSeek LLM, DeepSeek-Coder, R1's Llama distillations, SmolLM2."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import all_dense, read_grouped, the_grouped, uniform, write_grouped
from finemoe.checkpoint.huggingface.layers import dense, refuse_mtp
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    window = fields.raw.get("sliding_window")
    if isinstance(window, int) and window >= fields.integer("max_position_embeddings"):
        fields.idle("sliding_window", window)  # longer than any text
    return uniform(fields, read_grouped(fields), dense(fields.integer("intermediate_size")))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention, plain = the_grouped(config), all_dense(config)
    if config.hidden_size % attention.num_heads:
        raise CheckpointError(f"hidden_size {config.hidden_size} is no multiple of its {attention.num_heads} heads")
    return {
        **write_grouped(config, attention, max_positions),
        "attention_bias": False,
        "head_dim": attention.head_dim,
        "intermediate_size": plain.ffn_hidden_size,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }


FAMILY = Family("llama", "LlamaForCausalLM", _read, _write)
