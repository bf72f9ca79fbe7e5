"""Attention variants. A new one is a file with its config, module and cache, and a line in ATTENTIONS."""

from __future__ import annotations

from typing import Any

from torch import nn

from finemoe.core.config import Config, union_of
from finemoe.model.attention.grouped_query import GroupedQueryAttention, GroupedQueryCache, GroupedQueryConfig

ATTENTIONS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "grouped_query": (GroupedQueryConfig, GroupedQueryAttention),
}
AttentionConfig: Any = union_of(config for config, _ in ATTENTIONS.values())
AttentionCache = GroupedQueryCache
