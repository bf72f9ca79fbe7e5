"""Grouped-query attention (Ainslie et al., 2023): MHA when every head has its key, MQA when all share one."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.attention.blocks import attend, put, zeros
from finemoe.model.attention.places import Places, store
from finemoe.model.backend import Backend
from finemoe.model.norm import RMSNorm
from finemoe.model.projection import Projection
from finemoe.model.rope import RopeConfig, the_same
from finemoe.model.spans import Spans


class GroupedQueryConfig(Config):
    """num_kv_heads = num_heads is MHA, 1 is MQA."""

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    """[heads] Query heads."""
    num_kv_heads: PositiveInt
    """[heads] Key and value heads, each shared by equally many query heads."""
    head_dim: PositiveInt
    """[components] Width of a head."""
    rope: RopeConfig = RopeConfig()
    """Rotary positions."""
    rotary_dim: PositiveInt | None = None
    """[components] How many components of a head have positions, counted from its first (GLM-4.5: half); None: all."""
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
        if self.rotary_dim is None:
            self.rope.check_dim(self.head_dim, "head_dim")
        elif self.rotary_dim >= self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} is not below head_dim {self.head_dim}: leave it out where all turn"
            )
        else:
            self.rope.check_dim(self.rotary_dim, "rotary_dim")
        return self

    @property
    def turning(self) -> int:
        """How many components of a head turn."""
        return self.rotary_dim or self.head_dim

    def num_parameters(self, hidden_size: int) -> int:
        """Query, key, value and output projections, with what biases and norms there are."""
        bias = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        return self.num_product_weights(hidden_size) + bias + sum(self.norm_sizes())

    def num_product_weights(self, hidden_size: int) -> int:
        """The projections alone: what every token is multiplied by. Biases and norms are no products."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def norm_sizes(self) -> tuple[int, ...]:
        """Sizes of the norms of queries and keys."""
        if self.qk_norm == "none":
            return ()
        heads = (1, 1) if self.qk_norm == "head" else (self.num_heads, self.num_kv_heads)
        return tuple(self.head_dim * count for count in heads)

    def num_product_weights_as_multi_head(self, hidden_size: int) -> int:
        """The projections, with a key and a value for every head: how the papers count FLOPs."""
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

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.known: dict[object, Any] = {}  # by block: what it computes with over this cache, for it to keep

    def update(self, keys: Tensor, values: Tensor, places: Places) -> tuple[Tensor, Tensor, Spans]:
        """Store `[batch, kv_heads, seq, head_dim]` at the places.

        Returns all keys and values up to the largest position, and what each token sees of them.
        """
        store(keys, places, self.keys)
        store(values, places, self.values)
        length = places.reach
        # Under autocast the states are narrower than the weights, and than the cache that took their dtype.
        return self.keys[:, :, :length].to(keys.dtype), self.values[:, :, :length].to(values.dtype), places.seen

    def copy(self, source: int, target: int) -> None:
        """The states of one block into another."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]

    def rows(self, first: int, last: int) -> GroupedQueryCache:
        """Rows first ... last - 1 of the batch, in the same memory."""
        return GroupedQueryCache(self.keys[first:last], self.values[first:last])

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows of the batch."""
        for states in (self.keys, self.values):
            states[[first, second]] = states[[second, first]]


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GroupedQueryConfig, hidden_size: int, norm_eps: float, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.rope = the_same(config.rope)
        self.scale = config.rope.softmax_factor / math.sqrt(config.head_dim)
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Projection(hidden_size, query_size, backend, bias=config.qkv_bias)
        self.k_proj = Projection(hidden_size, key_size, backend, bias=config.qkv_bias)
        self.v_proj = Projection(hidden_size, key_size, backend, bias=config.qkv_bias)
        self.o_proj = Projection(query_size, hidden_size, backend)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            self.q_norm, self.k_norm = (RMSNorm(size, norm_eps, backend) for size in config.norm_sizes())

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> GroupedQueryCache:
        """An empty cache on the weights' device, in their dtype where it is not given; or so many blocks of it."""
        shape = (batch, self.config.num_kv_heads, capacity, self.config.head_dim)
        weight = self.k_proj.weight
        return GroupedQueryCache(zeros(shape, weight, dtype), zeros(shape, weight, dtype))

    def forward(self, hidden: Tensor, *, places: Places, cache: GroupedQueryCache | None) -> Tensor:
        """`hidden [batch, seq, hidden]`; the mask of `places` is for attention without a cache."""
        decode, where = self.backend.decode, None if cache is None else self.where(places)
        if decode is not None and cache is not None and where is not None and decode.takes(hidden):
            own = self.parts(cache)
            if own is not None:
                return decode.grouped_query(places.apart(hidden), *own[1:], *where).view_as(hidden)
        rope, mask = self.rope, places.mask
        rotary = places.rotation(self.config.turning, rope)
        query, key = self._heads(self.q_proj(hidden), self.q_norm), self._heads(self.k_proj(hidden), self.k_norm)
        value = self._heads(self.v_proj(hidden), None)
        query, key = (self.backend.rotate(states, *rotary, rope.layout, first=True) for states in (query, key))
        if cache is not None and places.groups:
            mixed = self._in_blocks(query, key, value, places, cache)
        else:
            if cache is not None:
                key, value, mask = cache.update(key, value, places)
            mixed = self.backend.attend(query, key, value, mask, self.scale).transpose(1, 2).flatten(2)
        output: Tensor = self.o_proj(mixed)
        return output

    def _in_blocks(self, query: Tensor, key: Tensor, value: Tensor, places: Places, cache: GroupedQueryCache) -> Tensor:
        """A flat pass, group by group: `[1, heads, tokens, head_dim]` in, `[1, tokens, heads · head_dim]` out."""
        mixed = []
        for number, group in enumerate(places.groups):
            index = places.index(self.config.num_kv_heads, number)
            put(group.of(key), group, index, cache.keys)
            put(group.of(value), group, index, cache.values)
            found = attend(self.backend, group.of(query), cache.keys, cache.values, group, index, self.scale)
            mixed.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(mixed)[None]

    def parts(self, cache: GroupedQueryCache) -> tuple[Any, ...] | None:
        """0, and all that the layer computes with, for one call; None where it must go operation by operation."""
        decode = self.backend.decode
        if decode is None or not decode.reads(cache.keys, self.q_proj.weight):
            return None
        q_norm, k_norm = self.q_norm, self.k_norm
        return (
            0,
            *(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight),
            *(self.q_proj.bias, self.k_proj.bias, self.v_proj.bias),
            *(None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight),
            *(0.0 if q_norm is None else q_norm.eps, self.config.rope.layout == "interleaved"),
            *(cache.keys, cache.values, self.scale, self.o_proj.weight),
        )

    def where(self, places: Places) -> tuple[Tensor | None, ...] | None:
        """Cosines, sines, positions and the index of the cache, for one call; None where the pass is too mixed."""
        if not places.queries:
            return None
        index = places.index(self.config.num_kv_heads) if places.groups else None
        return (*places.rotation(self.config.turning, self.rope), places.own_positions, index)

    def _heads(self, states: Tensor, norm: RMSNorm | None) -> Tensor:
        """`[batch, seq, heads · head_dim]` to `[batch, heads, seq, head_dim]`, normalised on the way."""
        if norm is not None and self.config.qk_norm == "projection":
            states = norm(states)
        states = states.unflatten(-1, (-1, self.config.head_dim))
        if norm is not None and self.config.qk_norm == "head":
            states = norm(states)
        return states.transpose(1, 2)
