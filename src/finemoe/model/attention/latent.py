"""Multi-head latent attention (DeepSeek-V2 section 2.1): keys and values of all heads from one small cached latent.

Two forms of one function. Expanded: every head's keys and values are computed from the latents, then attention is the
usual. Absorbed: the up-projections move to the other side of the products, queries and outputs live in latent space,
and attention runs over the latents themselves, as over a single key head. Prefill and training are cheaper expanded,
decoding absorbed.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.attention.kernels import Attend
from finemoe.model.norm import RMSNorm
from finemoe.model.projection import Projection
from finemoe.model.rope import RopeConfig, rotate, rotation

LatentForm = Literal["auto", "expanded", "absorbed"]


class LatentConfig(Config):
    """In the papers' letters: d'_c, d_c, d_h, d_h^R; d_h of the values apart."""

    kind: Literal["latent"] = "latent"
    num_heads: PositiveInt
    q_lora_rank: PositiveInt | None = None
    """Width of the compressed query, d'_c; None: queries come straight from the hidden state (V2-Lite)."""
    kv_lora_rank: PositiveInt
    """Width of the cached latent, d_c."""
    qk_nope_head_dim: PositiveInt
    """Part of a head's query and key without positions, d_h."""
    qk_rope_head_dim: PositiveInt
    """Part with rotary positions, d_h^R; its key is shared by all heads."""
    v_head_dim: PositiveInt
    rope: RopeConfig = RopeConfig(layout="interleaved")
    latent_norm_eps: PositiveFloat = 1e-6
    """Of the norms on both latents: a constant in DeepSeek's code, whatever the model's norm_eps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.rope.check_dim(self.qk_rope_head_dim, "qk_rope_head_dim")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's whole query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def num_parameters(self, hidden_size: int) -> int:
        """Every projection and the norms on the latents."""
        queries = self.num_heads * self.qk_head_dim
        compressed = self.q_lora_rank
        query = hidden_size * queries if compressed is None else compressed * (hidden_size + 1 + queries)
        key_value = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        return query + down + self.kv_lora_rank * key_value + self.num_heads * self.v_head_dim * hidden_size

    def num_parameters_as_multi_head(self, hidden_size: int) -> int:
        """The papers print no FLOPs of a latent model in another convention: as built."""
        return self.num_parameters(hidden_size)

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
    """Latents `[batch, capacity, kv_lora_rank]` and rotary keys `[batch, capacity, qk_rope_head_dim]` of one layer.

    Rows are written at each token's position and a query sees positions up to its own, as in GroupedQueryCache.
    """

    def __init__(self, latents: Tensor, rotary_keys: Tensor) -> None:
        self.latents = latents
        self.rotary_keys = rotary_keys

    def update(self, latents: Tensor, rotary_keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store `[batch, seq, ...]` at `positions [batch, seq]`.

        Returns all latents and rotary keys up to the largest position, and the mask `[batch, 1, seq, keys]`.
        """
        length = int(positions.max()) + 1
        if length > self.latents.shape[1]:
            raise IndexError(f"position {length - 1} is beyond the cache's capacity of {self.latents.shape[1]} tokens")
        for store, fresh in ((self.latents, latents), (self.rotary_keys, rotary_keys)):
            store.scatter_(1, positions[:, :, None].expand_as(fresh), fresh.to(store.dtype))
        mask = torch.arange(length, device=positions.device) <= positions[:, None, :, None]
        seen = slice(0, length)
        return self.latents[:, seen].to(latents.dtype), self.rotary_keys[:, seen].to(latents.dtype), mask


class LatentAttention(nn.Module):
    """Causal self-attention over latents. `form` says which of the two forms runs; "auto" takes the cheaper."""

    def __init__(
        self, config: LatentConfig, hidden_size: int, norm_eps: float, attend: Attend, form: LatentForm = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.attend = attend
        self.form = form
        self.scale = config.rope.softmax_factor / math.sqrt(config.qk_head_dim)
        queries = config.num_heads * config.qk_head_dim
        self.q_down_proj: nn.Linear | None = None
        self.q_norm: RMSNorm | None = None
        if config.q_lora_rank is None:
            self.q_proj = Projection(hidden_size, queries)
        else:
            self.q_down_proj = Projection(hidden_size, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_proj = Projection(config.q_lora_rank, queries)
        self.kv_down_proj = Projection(hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        width = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_up_proj = Projection(config.kv_lora_rank, width)
        self.o_proj = Projection(config.num_heads * config.v_head_dim, hidden_size)

    def new_cache(self, batch: int, capacity: int) -> LatentCache:
        """An empty cache in the weights' dtype and device."""
        weight = self.kv_down_proj.weight
        sizes = (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        return LatentCache(*(weight.new_zeros(batch, capacity, size) for size in sizes))

    def forward(self, hidden: Tensor, *, positions: Tensor, mask: Tensor | None, cache: LatentCache | None) -> Tensor:
        """`hidden [batch, seq, hidden]`, `positions [batch, seq]`; mask as in `kernels.Attend`, unused with a cache."""
        config, rope = self.config, self.config.rope
        rotary = rotation(positions, config.qk_rope_head_dim, rope)
        query = hidden if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(hidden))
        query = self.q_proj(query).unflatten(-1, (config.num_heads, config.qk_head_dim)).transpose(1, 2)
        plain, turning = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        turning = rotate(turning, *rotary, rope.layout)
        latent, key = self.kv_down_proj(hidden).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        latent = self.kv_norm(latent)
        key = rotate(key[:, None], *rotary, rope.layout)[:, 0]  # one head, shared by all
        if cache is not None:
            latent, key, mask = cache.update(latent, key, positions)
        form = self._absorbed if self._absorbs(cache is not None, hidden.shape[1]) else self._expanded
        mixed = form(plain, turning, latent, key, mask)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def _absorbs(self, cached: bool, num_queries: int) -> bool:
        if self.form == "auto":
            return cached and self.config.prefers_absorbed(num_queries)
        return self.form == "absorbed"

    def _expanded(self, plain: Tensor, turning: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every head from the latents; `[batch, heads, seq, v_head_dim]` out."""
        config = self.config
        heads = self.kv_up_proj(latent).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        plain_key, value = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        shared = key[:, None].expand(-1, config.num_heads, -1, -1)
        keys = torch.cat((plain_key, shared), dim=-1)
        return self.attend(torch.cat((plain, turning), dim=-1), keys, value, mask, self.scale)

    def _absorbed(self, plain: Tensor, turning: Tensor, latent: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """W_UK moves to the queries, W_UV to the outputs: score = (q W_UK) · c + q_R · k_R."""
        config = self.config
        batch, num_heads, seq, _ = plain.shape
        up = self.kv_up_proj.weight.to(plain.dtype).unflatten(0, (num_heads, -1))
        up_key, up_value = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        query = torch.cat((plain @ up_key, turning), dim=-1)
        if mask is None:
            mask = torch.ones(seq, latent.shape[1], dtype=torch.bool, device=latent.device).tril()
        # All heads share one key: they line up behind each other as if they were more queries of one head.
        mask = mask.expand(batch, 1, seq, -1).repeat(1, 1, num_heads, 1)
        keys = torch.cat((latent, key), dim=-1)[:, None]
        mixed = self.attend(query.reshape(batch, 1, num_heads * seq, -1), keys, latent[:, None], mask, self.scale)
        return mixed.view(batch, num_heads, seq, -1) @ up_value.transpose(1, 2)
