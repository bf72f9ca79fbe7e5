"""What families with multi-head latent attention share: reading it and writing it."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.layers import the_attention, write_common
from finemoe.checkpoint.huggingface.rope import read_rope, write_rope
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import ModelConfig
from finemoe.model.rope import RopeLayout

_LATENT_EPS = 1e-6  # a constant in DeepSeek's code and in transformers, whatever rms_norm_eps


def read_latent(fields: Fields, layout: RopeLayout) -> dict[str, Any]:
    """Latent attention with rotary components in `layout`.

    Raises:
        CheckpointError: sizes that do not go together, or settings that implementations read differently.
    """
    heads, rotary = fields.integer("num_attention_heads"), fields.integer("qk_rope_head_dim")
    plain = fields.integer("qk_nope_head_dim")
    if fields.has("num_key_value_heads"):
        fields.only("num_key_value_heads", heads, why=f"latent attention has a key for each of its {heads} heads")
    fields.only("head_dim", rotary, why=f"in this family it repeats qk_rope_head_dim {rotary}")
    fields.only("qk_head_dim", plain + rotary, why=f"in this family it is {plain} + {rotary}")
    return {
        "kind": "latent",
        "num_heads": heads,
        "q_lora_rank": fields.optional_integer("q_lora_rank"),
        "kv_lora_rank": fields.integer("kv_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotary,
        "v_head_dim": fields.integer("v_head_dim"),
        "rope": read_rope(fields, rotary, layout, "both").settings,
        "latent_norm_eps": _LATENT_EPS,
    }


def the_latent(config: ModelConfig) -> LatentConfig:
    """The attention of all layers.

    Raises:
        CheckpointError: the family's is another.
    """
    attention = the_attention(config)
    if not isinstance(attention, LatentConfig):
        raise CheckpointError(f"it has {attention.kind} attention, and the family latent attention")
    if attention.latent_norm_eps != _LATENT_EPS:
        raise CheckpointError(f"latent_norm_eps is {attention.latent_norm_eps:g}, and the family's {_LATENT_EPS:g}")
    return attention


def write_latent(config: ModelConfig, attention: LatentConfig, max_positions: int | None) -> dict[str, Any]:
    """The fields that all these families share; `attention` comes from `the_latent`.

    Raises:
        CheckpointError: rotary settings that implementations read differently, or nobody says how long a sequence is.
    """
    return {
        **write_common(config, max_positions),
        **write_rope(attention.rope, attention.qk_rope_head_dim, "both"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "kv_lora_rank": attention.kv_lora_rank,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "pretraining_tp": 1,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
    }
