"""Mistral, where every token sees all before it (7B v0.2 and later): Llama in every tensor."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.family import Family
from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.grouped import all_dense, read_grouped, the_grouped, uniform, write_grouped
from finemoe.checkpoint.huggingface.layers import dense, refuse_mtp
from finemoe.model.config import ModelConfig


def _read(fields: Fields) -> ModelConfig:
    window = fields.value("sliding_window")
    if window is not None:
        longest = fields.integer("max_position_embeddings")
        if fields.integer("sliding_window") < longest:
            left_out = "" if "sliding_window" in fields.raw else ", and this family has one where the field is left out"
            why = f"finemoe has no sliding-window attention{left_out}; it reads null, or at least the {longest} of "
            fields.refuse("sliding_window", window, f"{why}`max_position_embeddings`")
    return uniform(fields, read_grouped(fields), dense(fields.integer("intermediate_size")))


def _write(config: ModelConfig, max_positions: int | None) -> dict[str, Any]:
    refuse_mtp(config)
    attention, plain = the_grouped(config), all_dense(config)
    return {
        **write_grouped(config, attention, max_positions),
        "head_dim": attention.head_dim,
        "intermediate_size": plain.ffn_hidden_size,
        "sliding_window": None,
    }


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
)
