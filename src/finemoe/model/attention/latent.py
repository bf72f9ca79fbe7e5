"""Multi-head latent attention (DeepSeek-V2 section 2.1): keys and values of all heads from one small cached latent.

Two forms of one function. Expanded: every head's keys and values are computed from the latents, then attention is the
usual. Absorbed: the up-projections move to the other side of the products, queries and outputs live in latent space,
and attention runs over the latents themselves, as over a single key head. Prefill and training are cheaper expanded,
decoding absorbed.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.attention.blocks import attend, gather, put, zeros
from finemoe.model.attention.places import Places, store
from finemoe.model.backend import Backend
from finemoe.model.norm import RMSNorm
from finemoe.model.projection import Projection
from finemoe.model.rope import RopeConfig, the_same
from finemoe.model.spans import Mask, Spans

LatentForm = Literal["auto", "expanded", "absorbed"]


class LatentConfig(Config):
    """In the papers' letters: d'_c, d_c, d_h, d_h^R; d_h of the values apart."""

    kind: Literal["latent"] = "latent"
    num_heads: PositiveInt
    """[heads] Heads; each has keys and values of its own, made from the latent."""
    q_lora_rank: PositiveInt | None = None
    """[components] Width of the compressed query, d'_c; None: queries come straight from the hidden state (V2-Lite)."""
    kv_lora_rank: PositiveInt
    """[components] Width of the cached latent, d_c."""
    qk_nope_head_dim: PositiveInt
    """[components] Part of a head's query and key without positions, d_h."""
    qk_rope_head_dim: PositiveInt
    """[components] Part with rotary positions, d_h^R; its key is shared by all heads."""
    v_head_dim: PositiveInt
    """[components] Of a head's value."""
    rope: RopeConfig = RopeConfig(layout="interleaved")
    """Rotary positions."""
    latent_norm_eps: PositiveFloat = 1e-6
    """[added] In the norms on both latents: a constant in DeepSeek's code, whatever the model's norm_eps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.rope.check_dim(self.qk_rope_head_dim, "qk_rope_head_dim")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's whole query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def turning(self) -> int:
        """How many components of a head turn."""
        return self.qk_rope_head_dim

    def num_parameters(self, hidden_size: int) -> int:
        """Every projection and the norms on the latents."""
        return self.num_product_weights(hidden_size) + self.kv_lora_rank + (self.q_lora_rank or 0)

    def num_product_weights(self, hidden_size: int) -> int:
        """The projections alone: what every token is multiplied by. Norms are no products."""
        queries = self.num_heads * self.qk_head_dim
        compressed = self.q_lora_rank
        query = hidden_size * queries if compressed is None else compressed * (hidden_size + queries)
        key_value = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        return query + down + self.kv_lora_rank * key_value + self.num_heads * self.v_head_dim * hidden_size

    def num_product_weights_as_multi_head(self, hidden_size: int) -> int:
        """The papers print no FLOPs of a latent model in another convention: as built."""
        return self.num_product_weights(hidden_size)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of scores and mixing for one token, expanded, without the causal saving."""
        return 2 * seq_len * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    def cache_elements_per_token(self) -> int:
        """Numbers cached for one token in one layer: d_c + d_h^R (V2 Table 1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def prefers_absorbed(self, num_queries: int) -> bool:
        """Whether the absorbed form needs fewer products for `num_queries` new tokens over one cached token."""
        expand = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        extra = 2 * self.kv_lora_rank - self.qk_nope_head_dim - self.v_head_dim
        return num_queries * extra <= expand


class LatentCache:
    """What is kept of one layer, `[batch, capacity, kv_lora_rank + qk_rope_head_dim]`: latent and rotary key.

    Rows are written at each token's position and a query sees positions up to its own, as in GroupedQueryCache.
    """

    def __init__(self, states: Tensor, kv_lora_rank: int) -> None:
        self.states = states
        self.kv_lora_rank = kv_lora_rank
        self.known: dict[object, Any] = {}  # by block, as in GroupedQueryCache

    def update(self, latents: Tensor, rotary_keys: Tensor, places: Places) -> tuple[Tensor, Spans]:
        """Store both, `[batch, seq, ...]`, at the places.

        Returns all of the cache up to the largest position, and what each token sees of it.
        """
        heads = self.states[:, None]
        store(latents[:, None], places, heads[..., : self.kv_lora_rank])
        store(rotary_keys[:, None], places, heads[..., self.kv_lora_rank :])
        return self.states[:, : places.reach].to(latents.dtype), places.seen

    def copy(self, source: int, target: int) -> None:
        """The states of one block into another."""
        self.states[target] = self.states[source]

    def rows(self, first: int, last: int) -> LatentCache:
        """Rows first ... last - 1 of the batch, in the same memory."""
        return LatentCache(self.states[first:last], self.kv_lora_rank)

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows of the batch."""
        self.states[[first, second]] = self.states[[second, first]]


class LatentAttention(nn.Module):
    """Causal self-attention over latents. `form` says which of the two forms runs; "auto" takes the cheaper."""

    def __init__(
        self, config: LatentConfig, hidden_size: int, norm_eps: float, backend: Backend, form: LatentForm = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.form = form
        self.rope = the_same(config.rope)
        self.scale = config.rope.softmax_factor / math.sqrt(config.qk_head_dim)
        queries = config.num_heads * config.qk_head_dim
        self.q_down_proj: nn.Linear | None = None
        self.q_norm: RMSNorm | None = None
        if config.q_lora_rank is None:
            self.q_proj = Projection(hidden_size, queries, backend)
        else:
            self.q_down_proj = Projection(hidden_size, config.q_lora_rank, backend)
            self.q_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps, backend)
            self.q_proj = Projection(config.q_lora_rank, queries, backend)
        self.kv_down_proj = Projection(hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, backend)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps, backend)
        width = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_up_proj = Projection(config.kv_lora_rank, width, backend)
        self.o_proj = Projection(config.num_heads * config.v_head_dim, hidden_size, backend)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> LatentCache:
        """An empty cache on the weights' device, in their dtype where it is not given; or so many blocks of it."""
        shape, weight = (batch, capacity, self.config.cache_elements_per_token()), self.kv_down_proj.weight
        return LatentCache(zeros(shape, weight, dtype), self.config.kv_lora_rank)

    def forward(self, hidden: Tensor, *, places: Places, cache: LatentCache | None) -> Tensor:
        """`hidden [batch, seq, hidden]`; the mask of `places` is for attention without a cache."""
        absorbs = self._absorbs(cache is not None, places.queries)
        decode, where = self.backend.decode, None if cache is None else self.where(places)
        if decode is not None and cache is not None and where is not None and decode.takes(hidden):
            own = self.parts(cache)
            if own is not None:
                return decode.latent(places.apart(hidden), *own[1:], *where).view_as(hidden)
        config, rope, mask = self.config, self.rope, places.mask
        rotary = places.rotation(config.qk_rope_head_dim, rope)
        query = hidden if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(hidden))
        query = self.q_proj(query).unflatten(-1, (config.num_heads, config.qk_head_dim)).transpose(1, 2)
        query = self.backend.rotate(query, *rotary, rope.layout)
        latent, key = self.kv_down_proj(hidden).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        latent = self.kv_norm(latent)
        key = self.backend.rotate(key[:, None], *rotary, rope.layout)[:, 0]  # one head, shared by all
        if places.context is not None:  # what every key and value is made of: far less than these
            both = places.context.gather(torch.cat((latent, key), dim=-1))
            latent, key = both.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        states: Tensor | None = None
        if cache is not None and places.groups:
            mixed = self._in_blocks(query, torch.cat((latent, key), dim=-1), places, cache)
        else:
            if cache is not None:
                states, mask = cache.update(latent, key, places)
                latent, key = states.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
            if absorbs:
                states = torch.cat((latent, key), dim=-1) if states is None else states
                mixed = self._absorbed(query, states, mask)
            else:
                mixed = self._expanded(query, latent, key, mask)
            mixed = mixed.transpose(1, 2).flatten(2)
        output: Tensor = self.o_proj(mixed)
        return output

    def _in_blocks(self, query: Tensor, states: Tensor, places: Places, cache: LatentCache) -> Tensor:
        """A flat pass: `query [1, heads, tokens, qk_head_dim]`, and `states [1, tokens, width]` that are new.

        Each group takes the form that is cheaper for it. Returns `[1, tokens, heads · v_head_dim]`.
        """
        mixed = []
        store, rank = cache.states[:, None], self.config.kv_lora_rank
        for number, group in enumerate(places.groups):
            index = places.index(1, number)
            put(group.of(states[:, None]), group, index, store)
            own = group.of(query)
            if self._absorbs(True, group.positions.shape[1]):
                up_key, up_value = self._up(query.dtype)
                inner = self._to_latents(own, up_key)
                found = attend(self.backend, inner, store, store[..., :rank], group, index, self.scale) @ up_value
            else:
                latent, key = gather(store, group, query.dtype)[:, 0].split(
                    (rank, self.config.qk_rope_head_dim), dim=-1
                )
                found = self._expanded(own, latent, key, group.seen)
            mixed.append(found.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(mixed)[None]

    def parts(self, cache: LatentCache) -> tuple[Any, ...] | None:
        """1, and all that the layer computes with, for the absorbed form in one call; None where it takes another."""
        decode = self.backend.decode
        if decode is None or not decode.reads(cache.states, self.q_proj.weight):
            return None
        config, down, norm = self.config, self.q_down_proj, self.q_norm
        return (
            1,
            *(None if down is None else down.weight, None if norm is None else norm.weight),
            *(self.q_proj.weight, self.kv_down_proj.weight, self.kv_norm.weight, self.kv_up_proj.weight),
            *(config.latent_norm_eps, config.num_heads, config.rope.layout == "interleaved"),
            *(cache.states, self.scale, self.o_proj.weight),
        )

    def where(self, places: Places) -> tuple[Tensor | None, ...] | None:
        """Cosines, sines, positions and the index of the cache, for one call; None where it is not absorbed."""
        if not places.queries or not self._absorbs(True, places.queries):
            return None
        index = places.index(1) if places.groups else None
        return (*places.rotation(self.config.qk_rope_head_dim, self.rope), places.own_positions, index)

    def _absorbs(self, cached: bool, num_queries: int) -> bool:
        if self.form == "auto":
            return cached and self.config.prefers_absorbed(num_queries)
        return self.form == "absorbed"

    def _expanded(self, query: Tensor, latent: Tensor, key: Tensor, mask: Mask) -> Tensor:
        """Keys and values of every head from the latents; `[batch, heads, seq, v_head_dim]` out."""
        config = self.config
        heads = self.kv_up_proj(latent).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        plain_key, value = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        shared = key[:, None].expand(-1, config.num_heads, -1, -1)
        return self.backend.attend(query, torch.cat((plain_key, shared), dim=-1), value, mask, self.scale)

    def _absorbed(self, query: Tensor, states: Tensor, mask: Mask) -> Tensor:
        """W_UK moves to the queries, W_UV to the outputs: score = (q W_UK) · c + q_R · k_R, one key for all heads."""
        up_key, up_value = self._up(query.dtype)
        keys = states[:, None]
        values = keys[..., : self.config.kv_lora_rank]
        return self.backend.attend(self._to_latents(query, up_key), keys, values, mask, self.scale) @ up_value

    def _up(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK `[heads, qk_nope_head_dim, latent]` and W_UV `[heads, latent, v_head_dim]`."""
        config = self.config
        up = self.kv_up_proj.weight.to(dtype).unflatten(0, (config.num_heads, -1))
        up_key, up_value = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return up_key, up_value.transpose(1, 2)

    def _to_latents(self, query: Tensor, up_key: Tensor) -> Tensor:
        """Queries that meet latents and rotary keys: `[batch, heads, seq, kv_lora_rank + qk_rope_head_dim]`."""
        plain, turning = query.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return torch.cat((plain @ up_key, turning), dim=-1)
