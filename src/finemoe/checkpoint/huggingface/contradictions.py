"""Which sizes in config.json are others than those of the weights: told where tensors and configuration do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finemoe.checkpoint.huggingface.keys import Spellings
from finemoe.checkpoint.storage.safetensors import TensorFolder
from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_MODULE = frozenset({"eh_proj.weight", "enorm.weight", "hnorm.weight"})
"""What a layer has that predicts further tokens, and no other."""
_SHOWN = 4


def contradictions(raw: Mapping[str, Any], config: ModelConfig, names: Spellings, tensors: TensorFolder) -> str:
    """A sentence on the fields of config.json that the weights contradict; empty where none is known to.

    Args:
        raw: config.json.
        config: the model that it describes.
        names: how the family spells the parts of an MoE layer.
        tensors: the weights.
    """
    said: dict[str, str] = {}
    for field, ours, theirs in _sizes(raw, config, names, tensors):
        if ours != theirs:
            left_out = "" if raw.get(field) is not None else " (left out, so by default)"
            said.setdefault(field, f"`{field}` is {ours}{left_out}, and the weights have {theirs}")
    if not said:
        return ""
    told = "; ".join(list(said.values())[:_SHOWN])
    return f". In config.json {told}: get the config.json that belongs to these weights, or what is missing of them"


def _sizes(
    raw: Mapping[str, Any], config: ModelConfig, names: Spellings, tensors: TensorFolder
) -> Iterator[tuple[str, int, int]]:
    """A field, what it says, and what the weights do."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, info in tensors.tensors.items():
        if (match := _LAYER.match(name)) is not None:
            layers.setdefault(int(match[1]), {})[match[2]] = info.shape
    modules = {index for index, parts in layers.items() if parts.keys() & _MODULE}
    known = sorted(layers.keys() - modules)
    if known == list(range(len(known))) and known:
        yield "num_hidden_layers", len(config.blocks), len(known)
    embedding = tensors.tensors.get("model.embed_tokens.weight")
    if embedding is not None and len(embedding.shape) == 2:
        yield "hidden_size", config.hidden_size, embedding.shape[1]
        if config.hidden_size != embedding.shape[1] and raw.get("head_dim") is None:
            return  # what follows from it is none of the fields' own fault
    for index, block in enumerate(config.blocks):
        if index in layers:
            yield from _of_attention(block, layers[index])
            yield from _of_feed_forward(raw, block, names, layers[index])


def _of_attention(block: BlockConfig, parts: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int, int]]:
    attention = block.attention
    if not isinstance(attention, GroupedQueryConfig):
        return
    rows = [_rows(parts, f"self_attn.{name}.weight") for name in ("q_proj", "k_proj")]
    heads, wide = (attention.num_heads, attention.num_kv_heads), attention.head_dim
    per_head = {found / said for found, said in zip(rows, heads, strict=True)}
    if len(per_head) == 1 and 0 not in per_head and per_head != {wide} and rows[0] % heads[0] == 0:
        yield "head_dim", wide, rows[0] // heads[0]
        return
    for field, said, found in zip(("num_attention_heads", "num_key_value_heads"), heads, rows, strict=True):
        if found and found % wide == 0:
            yield field, said, found // wide


def _of_feed_forward(
    raw: Mapping[str, Any], block: BlockConfig, names: Spellings, parts: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, int]]:
    layer = block.feed_forward
    if isinstance(layer, DenseConfig):
        if found := _rows(parts, "mlp.gate_proj.weight"):
            yield "intermediate_size", layer.ffn_hidden_size, found
    elif isinstance(layer, MoEConfig):
        each = re.compile(rf"{re.escape(names.moe)}\.experts\.(\d{{1,9}})\.")
        experts = {int(match[1]) for part in parts if (match := each.match(part)) is not None}
        if experts == set(range(len(experts))) and experts:
            field = next((name for name in _EXPERTS if name in raw), _EXPERTS[0])
            yield field, layer.num_routed_experts, len(experts)
        if found := _rows(parts, f"{names.moe}.experts.0.{names.gate}.weight"):
            field = "moe_intermediate_size" if "moe_intermediate_size" in raw else "intermediate_size"
            yield field, layer.expert_hidden_size, found


def _rows(parts: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Of a matrix; 0: there is none."""
    shape = parts.get(name, ())
    return shape[0] if len(shape) == 2 else 0
