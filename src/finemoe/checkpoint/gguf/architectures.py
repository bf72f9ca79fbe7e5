"""What llama.cpp computes under each name of an architecture: all that reader and writer need to know of it.

A new one is a line in ARCHITECTURES, where all that it does can be said here. Nobody compares names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.softmax_topk import SoftmaxTopKConfig
from finemoe.model.rope import Llama3Scaling


@dataclass(frozen=True)
class Experts:
    """How an architecture routes, by softmax over all experts."""

    normalized: bool
    """Whether the chosen gates are divided by their sum."""
    leading: bool = False
    """Whether dense layers may come first."""
    shared: Literal["none", "plain", "gated"] = "none"
    scaled: bool = False
    """Whether the gates are multiplied by `expert_weights_scale`."""
    own_width: bool = True
    """Whether `expert_feed_forward_length` is theirs; else `feed_forward_length` is."""
    divided: bool = False
    """Whether `feed_forward_length` over `expert_used_count` is their width where they are not given one."""


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`."""

    name: str
    latent: bool = False
    """Latent attention, with routers that the file describes."""
    neighbours: bool = False
    """Whether neighbouring components of a head turn together, so that files hold half-split rows interleaved."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    bias: bool | None = False
    """On queries, keys and values; None: as the file's tensors have it."""
    own_head_dim: bool = True
    """Whether heads may be wider than embedding_length / head_count."""
    shared_keys: bool = True
    """Whether several heads may share a key."""
    frequencies: bool = False
    """Whether `rope_freqs.weight` scales the rotary frequencies."""
    dense: bool = True
    """Whether it has a form in which no layer routes."""
    experts: Experts | None = None

    def suits(self, attention: GroupedQueryConfig | LatentConfig, moe: MoEConfig | None, hidden: int) -> bool:
        """Whether this is the architecture of a model with that attention and those experts."""
        if self.latent or isinstance(attention, LatentConfig):
            return self.latent and isinstance(attention, LatentConfig)
        wide = attention.num_heads * attention.head_dim != hidden
        return (
            (self.neighbours or attention.rope.layout == "half_split")
            and attention.qk_norm == self.qk_norm
            and (self.frequencies or not isinstance(attention.rope.scaling, Llama3Scaling))
            and self.bias in (None, attention.qkv_bias)
            and (self.own_head_dim or not wide)
            and (self.shared_keys or attention.num_heads == attention.num_kv_heads)
            and (self.dense if moe is None else self._routes(moe))
        )

    def _routes(self, moe: MoEConfig) -> bool:
        router = moe.router
        return (
            self.experts is not None
            and isinstance(router, SoftmaxTopKConfig)
            and router.normalize_gates == self.experts.normalized
            and moe.gate_shared_experts == (self.experts.shared == "gated")
        )


_ALL = (
    Architecture("qwen2", bias=True, own_head_dim=False),
    Architecture("qwen3", qk_norm="head"),
    Architecture(
        "qwen2moe",
        bias=True,
        own_head_dim=False,
        dense=False,
        experts=Experts(normalized=False, shared="gated", divided=True),
    ),
    Architecture("qwen3moe", qk_norm="head", dense=False, experts=Experts(normalized=True, divided=True)),
    Architecture(
        "olmoe",
        qk_norm="projection",
        own_head_dim=False,
        shared_keys=False,
        dense=False,
        experts=Experts(normalized=False, own_width=False),
    ),
    Architecture(
        "llama", neighbours=True, bias=None, frequencies=True, experts=Experts(normalized=True, own_width=False)
    ),
    Architecture(
        "deepseek",
        neighbours=True,
        bias=None,
        own_head_dim=False,
        experts=Experts(normalized=False, leading=True, shared="plain", scaled=True),
    ),
    Architecture(
        "deepseek2", latent=True, experts=Experts(normalized=False, leading=True, shared="plain", scaled=True)
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {found.name: found for found in _ALL}
"""By name; a model is written as the first that suits it."""


def architecture_of(
    attention: GroupedQueryConfig | LatentConfig, moe: MoEConfig | None, hidden: int
) -> Architecture | None:
    """The first architecture that suits a model; None where llama.cpp has none."""
    return next((found for found in _ALL if found.suits(attention, moe, hidden)), None)
