"""What a preset is, and the tables that several of them are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Table = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A named model."""

    summary: str
    """A few words, for a column of the list."""
    model: Mapping[str, Any]
    seq_len: int
    """Training sequence length of the source."""
    unrounded: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def attention(num_heads: int, head_dim: int, num_kv_heads: int | None = None, **more: Any) -> Table:
    """Grouped-query attention; MHA unless `num_kv_heads` says otherwise."""
    return {
        "kind": "grouped_query",
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads or num_heads,
        "head_dim": head_dim,
        **more,
    }


def dense(width: int) -> Table:
    """One SwiGLU."""
    return {"kind": "dense", "ffn_hidden_size": width}


def first_dense(count: int, width: int) -> Table:
    """The `leading` table: `count` dense layers at the bottom."""
    return {"count": count, "feed_forward": dense(width)}


def moe(
    shared: int,
    routed: int,
    active: int,
    width: int,
    router: str | Mapping[str, Any] = "softmax_topk",
    balance: Mapping[str, Any] | None = None,
    **more: Any,
) -> Table:
    """Shared and routed experts of `width`; a router without settings may be given by its name."""
    return {
        "kind": "moe",
        "num_shared_experts": shared,
        "num_routed_experts": routed,
        "experts_per_token": active,
        "expert_hidden_size": width,
        **more,
        "router": {"kind": router} if isinstance(router, str) else dict(router),
        "balance": dict(balance or {}),
    }
