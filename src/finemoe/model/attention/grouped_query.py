"""Grouped-query attention (Ainslie et al., 2023): MHA when every head has its key, MQA when all share one."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.attention.kernels import Attend
from finemoe.model.norm import RMSNorm
from finemoe.model.projection import Projection
from finemoe.model.rope import RopeConfig, rotate, rotation


class GroupedQueryConfig(Config):
    """num_kv_heads = num_heads is MHA, 1 is MQA."""

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before rotation: of each head (Qwen3), or of all heads together (OLMoE)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key head must serve the same number of query heads"
            )
        self.rope.check_dim(self.head_dim, "head_dim")
        return self

    def num_parameters(self, hidden_size: int) -> int:
        """Query, key, value and output projections, with what biases and norms there are."""
        bias = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads) + bias + sum(self.norm_sizes())

    def norm_sizes(self) -> tuple[int, ...]:
        """Sizes of the norms of queries and keys."""
        if self.qk_norm == "none":
            return ()
        heads = (1, 1) if self.qk_norm == "head" else (self.num_heads, self.num_kv_heads)
        return tuple(self.head_dim * count for count in heads)

    def num_parameters_as_multi_head(self, hidden_size: int) -> int:
        """The same, with a key and a value for every head: how the papers count FLOPs."""
        return 4 * hidden_size * self.head_dim * self.num_heads

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of scores and mixing for one token, without the causal saving: 4 · seq · heads · dim."""
        return 4 * seq_len * self.num_heads * self.head_dim

    def cache_elements_per_token(self) -> int:
        """Numbers cached for one token in one layer (V2 Table 1: 2 · n_g · d_h)."""
        return 2 * self.num_kv_heads * self.head_dim


class GroupedQueryCache:
    """Keys and values of one layer, `[batch, kv_heads, capacity, head_dim]`.

    Rows are written at each token's position, and a query sees the keys at positions up to its own. So rows of
    different lengths share a batch: what padding wrote lies beyond the row's positions until it is overwritten.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.values = torch.zeros_like(keys)

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store `[batch, kv_heads, seq, head_dim]` at `positions [batch, seq]`.

        Returns all keys and values up to the largest position, and the mask `[batch, 1, seq, keys]`.
        """
        length = int(positions.max()) + 1
        if length > self.keys.shape[2]:
            raise IndexError(f"position {length - 1} is beyond the cache's capacity of {self.keys.shape[2]} tokens")
        index = positions[:, None, :, None].expand_as(keys)
        # Under autocast the states are narrower than the weights, and than the cache that took their dtype.
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))
        mask = torch.arange(length, device=positions.device) <= positions[:, None, :, None]
        return self.keys[:, :, :length].to(keys.dtype), self.values[:, :, :length].to(values.dtype), mask


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GroupedQueryConfig, hidden_size: int, norm_eps: float, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.attend = attend
        self.scale = config.rope.softmax_factor / math.sqrt(config.head_dim)
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Projection(hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = Projection(query_size, hidden_size)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (RMSNorm(size, norm_eps) for size in config.norm_sizes())

    def new_cache(self, batch: int, capacity: int) -> GroupedQueryCache:
        """An empty cache in the weights' dtype and device."""
        shape = (batch, self.config.num_kv_heads, capacity, self.config.head_dim)
        return GroupedQueryCache(self.k_proj.weight.new_zeros(shape))

    def forward(
        self, hidden: Tensor, *, positions: Tensor, mask: Tensor | None, cache: GroupedQueryCache | None
    ) -> Tensor:
        """`hidden [batch, seq, hidden]`, `positions [batch, seq]`; mask as in `kernels.Attend`, unused with a cache."""
        batch, seq, _ = hidden.shape
        rope = self.config.rope
        rotary = rotation(positions, self.config.head_dim, rope)
        query, key = self._heads(self.q_proj(hidden), self.q_norm), self._heads(self.k_proj(hidden), self.k_norm)
        value = self._heads(self.v_proj(hidden), None)
        query, key = rotate(query, *rotary, rope.layout), rotate(key, *rotary, rope.layout)
        if cache is not None:
            key, value, mask = cache.update(key, value, positions)
        mixed = self.attend(query, key, value, mask, self.scale)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))
        return output

    def _heads(self, states: Tensor, norm: RMSNorm | None) -> Tensor:
        """`[batch, seq, heads · head_dim]` to `[batch, heads, seq, head_dim]`, normalised on the way."""
        if norm is not None and self.config.qk_norm == "projection":
            states = norm(states)
        states = states.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return norm(states) if norm is not None and self.config.qk_norm == "head" else states
