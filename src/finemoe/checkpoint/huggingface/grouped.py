"""What families with grouped-query attention share: reading it, writing it, and models of layers that are all alike."""

from __future__ import annotations

from typing import Any, Literal

from finemoe.checkpoint.huggingface.fields import Fields
from finemoe.checkpoint.huggingface.layers import Layers, build, the_attention, the_dense, write_common
from finemoe.checkpoint.huggingface.rope import Meaning, read_rope, write_rope
from finemoe.core.errors import CheckpointError
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.config import ModelConfig
from finemoe.model.feed_forward import DenseConfig

QkNorm = Literal["none", "head", "projection"]


def read_grouped(
    fields: Fields,
    *,
    bias: bool = False,
    norm: QkNorm = "none",
    own_head_dim: bool = True,
    rotary_share: float | None = None,
    meaning: Meaning = "transformers",
) -> dict[str, Any]:
    """Grouped-query attention with half-split rotary positions.

    Args:
        fields: of the file.
        bias: on queries, keys and values.
        norm: of queries and keys.
        own_head_dim: whether the file may say a `head_dim`; else it is hidden_size / heads.
        rotary_share: the share of a head's components, from the first, that turn where the file says none; None: the
            family turns all of them.
        meaning: whose code says what the rotary settings mean.

    Raises:
        CheckpointError: sizes that do not go together.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads") if fields.has("num_key_value_heads") else None
    if kv_heads is None:
        kv_heads = fields.optional_integer("num_key_value_heads") or heads
    head_dim = hidden // heads
    if own_head_dim and fields.value("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    elif hidden % heads:
        fields.refuse("num_attention_heads", heads, f"it does not divide hidden_size {hidden}")
    elif not own_head_dim:
        fields.only("head_dim", head_dim, why=f"this family computes it as hidden_size / heads = {head_dim}")
    rope = read_rope(fields, head_dim, "half_split", meaning, share=rotary_share)
    return {
        "kind": "grouped_query",
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": rope.settings,
        "rotary_dim": None if rope.dim == head_dim else rope.dim,
        "qkv_bias": bias,
        "qk_norm": norm,
    }


def no_window(fields: Fields) -> None:
    """Sliding windows are refused where a layer has one; Qwen's configs name a size even where none is in use."""
    window, first = fields.raw.get("sliding_window", 4096), fields.raw.get("max_window_layers", 28)
    for name in ("sliding_window", "max_window_layers"):
        fields.has(name)
    full = isinstance(fields.raw.get("layer_types"), list)  # each layer says what it is, and was looked at before
    long = window is None or (isinstance(window, int) and window >= fields.integer("max_position_embeddings"))
    none = isinstance(first, int) and first >= fields.integer("num_hidden_layers")
    if not (full or long or none):
        why = f"finemoe has no sliding-window attention, and layers from {first} on have a window of {window}"
        fields.only("use_sliding_window", False, why=why)
    fields.has("use_sliding_window")


def always_normed(fields: Fields) -> None:
    """Some configs say `use_qk_norm`, which the code of families that always normalise never looks at."""
    fields.only("use_qk_norm", True, why="this family normalises queries and keys always")


def uniform(fields: Fields, attention: dict[str, Any], layer: dict[str, Any]) -> ModelConfig:
    """A model whose layers are all alike."""
    return build(fields, Layers(attention, lambda _: layer, fields.integer("num_hidden_layers")))


def the_grouped(
    config: ModelConfig, *, bias: bool | None = False, norm: QkNorm | None = "none", own_head_dim: bool = True
) -> GroupedQueryConfig:
    """The attention of all layers, which has half-split rotary positions over whole heads or their first components.

    Args:
        config: of the model.
        bias: what the family has on queries, keys and values; None: either.
        norm: what it has of queries and keys; None: any.
        own_head_dim: whether heads may be wider than hidden_size / heads.

    Raises:
        CheckpointError: the family's is another.
    """
    attention = the_attention(config)
    if not isinstance(attention, GroupedQueryConfig):
        raise CheckpointError(f"it has {attention.kind} attention, and the family grouped-query attention")
    if attention.rope.layout != "half_split":
        raise CheckpointError(f"its rotary layout is {attention.rope.layout}, and the family's half_split")
    if bias is not None and attention.qkv_bias != bias:
        raise CheckpointError(f"qkv_bias is {str(attention.qkv_bias).lower()}, and the family's {str(bias).lower()}")
    if norm is not None and attention.qk_norm != norm:
        raise CheckpointError(f"qk_norm is {attention.qk_norm!r}, and the family's {norm!r}")
    if not own_head_dim and attention.head_dim * attention.num_heads != config.hidden_size:
        raise CheckpointError(f"head_dim {attention.head_dim} is not hidden_size / heads, which the family takes")
    return attention


def write_grouped(
    config: ModelConfig, attention: GroupedQueryConfig, max_positions: int | None, meaning: Meaning = "transformers"
) -> dict[str, Any]:
    """The fields that all these families share; `attention` comes from `the_grouped`.

    Raises:
        CheckpointError: rotary settings that the family does not have, or nobody says how long a sequence may be.
    """
    return {
        **write_common(config, max_positions),
        **write_rope(attention.rope, attention.turning, meaning),
        "attention_dropout": 0.0,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
    }


def all_dense(config: ModelConfig) -> DenseConfig:
    """The feed-forward of a model in which no layer routes.

    Raises:
        CheckpointError: another model.
    """
    plain = the_dense(config.blocks)
    if plain is None or config.moe_layers:
        raise CheckpointError("it has MoE layers, and the family dense ones only")
    return plain
