"""Parameters, training FLOPs and cache size, from configuration alone: nothing is allocated.

FLOPs: 6 for each active weight and token, with one vocabulary matrix counted (the output head, tied or not), norms,
biases, routers and embedding look-up left out, plus attention scores without the causal saving. The papers' convention,
which reproduces the figures printed in DeepSeekMoE's tables, differs in two points: feed-forward widths are the
published fractions before rounding, and attention weighs as multi-head even where key heads are shared (DeepSeek 67B).

Multi-token prediction modules stand apart, as in V3's own figures: parameters, active ones and the cache are of the
main model. Training FLOPs include them, with one more head product for each, on every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig


@dataclass(frozen=True)
class ModelSize:
    """The size of one model."""

    total_parameters: int
    active_parameters: int
    """Weights one token passes through, embedding and head included: V3's 37B."""
    active_parameters_without_embedding: int
    """Without the input embedding, of which a token reads one row: V2-Lite's 2.4B. A tied one stays, as the head."""
    mtp_parameters: int
    """Weights that only multi-token prediction modules have, in no other figure; they share embedding and head."""
    expert_parameters: int
    """Weights of all feed-forward layers but the routers: what DeepSeekMoE's tables call expert parameters."""
    active_expert_parameters: int
    training_flops_per_token: float
    """As built."""
    training_flops_per_sequence: float
    """In the papers' convention; `notes` says where that differs from the model as built."""
    cache_elements_per_token: int
    seq_len: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "notes": list(self.notes)}


def measure(
    config: ModelConfig,
    seq_len: int,
    unrounded: Mapping[int, float] | None = None,
    notes: tuple[str, ...] = (),
) -> ModelSize:
    """The size of `config` at sequences of `seq_len` tokens.

    Args:
        config: the model.
        seq_len: tokens per sequence; attention's share of the FLOPs grows with it.
        unrounded: feed-forward widths as built -> as published, for papers that print FLOPs of unrounded widths.
        notes: carried over into the result, with what was found here.
    """
    hidden = config.hidden_size
    norms = (2 * len(config.blocks) + 1) * hidden
    embedding = config.vocab_size * hidden
    vocabulary = embedding * (1 if config.tie_embeddings else 2)
    attention = sum(block.attention.num_parameters(hidden) for block in config.blocks)
    layers = [block.feed_forward for block in config.blocks]
    total = sum(layer.num_parameters(hidden) for layer in layers)
    active = sum(layer.num_active_parameters(hidden) for layer in layers)
    routers = sum(_router_parameters(block, hidden) for block in config.blocks)
    published = _published_flops_per_token(config, seq_len, unrounded or {})
    as_built = training_flops_per_token(config, seq_len)
    printed, built = (f"{value * seq_len / 1e12:.4g}T" for value in (published, as_built))
    if printed != built:
        notes = (*notes, f"training FLOPs per sequence in the papers' convention {printed}, as built {built}")
    if config.mtp:
        notes = (*notes, "parameters and cache leave multi-token prediction out, training FLOPs include it")
    return ModelSize(
        total_parameters=norms + vocabulary + attention + total,
        active_parameters=norms + vocabulary + attention + active,
        active_parameters_without_embedding=norms + embedding + attention + active,
        mtp_parameters=sum(_module_parameters(block, hidden) for block in config.mtp),
        expert_parameters=total - routers,
        active_expert_parameters=active - routers,
        training_flops_per_token=as_built,
        training_flops_per_sequence=published * seq_len,
        cache_elements_per_token=sum(block.attention.cache_elements_per_token() for block in config.blocks),
        seq_len=seq_len,
        notes=notes,
    )


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `seq_len`, for the model as built."""
    attention = sum(block.attention.num_product_weights(config.hidden_size) for block in _all_blocks(config))
    return _flops(config, seq_len, attention, {})


def _published_flops_per_token(config: ModelConfig, seq_len: int, unrounded: Mapping[int, float]) -> float:
    blocks = _all_blocks(config)
    attention = sum(block.attention.num_product_weights_as_multi_head(config.hidden_size) for block in blocks)
    return _flops(config, seq_len, attention, unrounded)


def _flops(config: ModelConfig, seq_len: int, attention: float, unrounded: Mapping[int, float]) -> float:
    heads = (1 + len(config.mtp)) * config.vocab_size * config.hidden_size
    projections = len(config.mtp) * 2 * config.hidden_size**2
    experts = sum(_active_weights(block, config.hidden_size, unrounded) for block in _all_blocks(config))
    scores = 3 * sum(block.attention.flops_per_token(seq_len) for block in _all_blocks(config))
    return 6 * (heads + projections + attention + experts) + scores


def _all_blocks(config: ModelConfig) -> tuple[BlockConfig, ...]:
    """The main model's, then those of the multi-token prediction modules."""
    return config.blocks + config.mtp


def _module_parameters(block: BlockConfig, hidden_size: int) -> int:
    """One multi-token prediction module: its block, the projection of two states to one, and five norms."""
    layers: int = block.attention.num_parameters(hidden_size) + block.feed_forward.num_parameters(hidden_size)
    return layers + 2 * hidden_size**2 + 5 * hidden_size


def _active_weights(block: BlockConfig, hidden_size: int, unrounded: Mapping[int, float]) -> float:
    layer = block.feed_forward
    if isinstance(layer, DenseConfig):
        return 3 * hidden_size * unrounded.get(layer.ffn_hidden_size, layer.ffn_hidden_size)
    width = unrounded.get(layer.expert_hidden_size, layer.expert_hidden_size)
    return 3 * hidden_size * width * (layer.experts_per_token + layer.num_shared_experts)


def _router_parameters(block: BlockConfig, hidden_size: int) -> int:
    """What decides and weighs: the router, and the gate of the shared experts where there is one."""
    layer = block.feed_forward
    if not isinstance(layer, MoEConfig):
        return 0
    router: int = layer.router.num_parameters(hidden_size, layer.num_routed_experts)
    return router + (hidden_size if layer.gate_shared_experts else 0)
