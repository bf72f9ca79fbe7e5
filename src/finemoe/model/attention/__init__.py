"""Attention variants. A new one is a file with its config, module and cache, and a line in ATTENTIONS.

Every module is built as `Attention(config, hidden_size, norm_eps, backend)` and called as
`attention(hidden [batch, seq, hidden], places=, cache=)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from finemoe.core.config import Config, union_of
from finemoe.model.attention.grouped_query import GroupedQueryAttention, GroupedQueryCache, GroupedQueryConfig
from finemoe.model.attention.latent import LatentAttention, LatentCache, LatentConfig

ATTENTIONS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "grouped_query": (GroupedQueryConfig, GroupedQueryAttention),
    "latent": (LatentConfig, LatentAttention),
}
AttentionConfig: Any = union_of((config for config, _ in ATTENTIONS.values()), default="grouped_query")
AttentionCache = GroupedQueryCache | LatentCache
