"""Training FLOPs of a token, by what they are spent on, in the convention of published throughputs.

Six for each active weight of a product, three times those of a forward's scores, and of the scores only the causal
half: this reproduces NVIDIA's TFLOP/s over its tokens/s (`published.FLOPS`). `model.size` counts scores without that
saving, as DeepSeek's tables do. Norms, biases, routers and the embedding's look-up are left out of both.
"""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig


@dataclass(frozen=True)
class Flops:
    """Forward and backward of one token."""

    products: float = 0.0
    """Projections of attention, dense feed-forward, shared experts, those that join states for prediction modules."""
    experts: float = 0.0
    """Routed experts."""
    scores: float = 0.0
    """Attention's scores and their sums of values, the causal half."""
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.experts + self.scores + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.products + other.products,
            self.experts + other.experts,
            self.scores + other.scores,
            self.head + other.head,
        )


def block_flops(block: BlockConfig, hidden_size: int, seq_len: int) -> Flops:
    """Of one block, in a sequence of `seq_len` tokens."""
    layer = block.feed_forward
    products, experts = float(block.attention.num_product_weights(hidden_size)), 0.0
    if isinstance(layer, MoEConfig):
        expert = 3 * hidden_size * layer.expert_hidden_size
        products += expert * layer.num_shared_experts
        experts = float(expert * layer.experts_per_token)
    else:
        products += 3 * hidden_size * layer.ffn_hidden_size
    return Flops(6 * products, 6 * experts, 1.5 * block.attention.flops_per_token(seq_len))


def products_of(block: BlockConfig, hidden_size: int) -> list[tuple[int, int]]:
    """Numbers in and out, for a token, of each product of a block but those of routed experts."""
    attention, layer = block.attention, block.feed_forward
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        queries, compressed = heads * attention.qk_head_dim, attention.q_lora_rank
        found = [(hidden_size, queries)] if compressed is None else [(hidden_size, compressed), (compressed, queries)]
        found += [
            (hidden_size, attention.kv_lora_rank + attention.qk_rope_head_dim),
            (attention.kv_lora_rank, heads * (attention.qk_nope_head_dim + attention.v_head_dim)),
            (heads * attention.v_head_dim, hidden_size),
        ]
    else:
        joined = attention.head_dim * (heads + 2 * attention.num_kv_heads)
        found = [(hidden_size, joined), (heads * attention.head_dim, hidden_size)]
    width = layer.ffn_hidden_size if not isinstance(layer, MoEConfig) else (
        layer.expert_hidden_size * layer.num_shared_experts
    )  # fmt: skip
    return [*found, (hidden_size, 2 * width), (width, hidden_size)] if width else found


def head_flops(config: ModelConfig) -> Flops:
    """Of the output head, once."""
    return Flops(head=6.0 * config.vocab_size * config.hidden_size)


def module_flops(config: ModelConfig, block: BlockConfig, seq_len: int) -> Flops:
    """Of one multi-token prediction module: its block, the product that joins two states, and the head once more."""
    joined = Flops(products=6.0 * 2 * config.hidden_size**2)
    return block_flops(block, config.hidden_size, seq_len) + joined + head_flops(config)


def training_flops(config: ModelConfig, seq_len: int) -> Flops:
    """Of the whole model, prediction modules included."""
    total = head_flops(config)
    for block in config.blocks:
        total += block_flops(block, config.hidden_size, seq_len)
    for block in config.mtp:
        total += module_flops(config, block, seq_len)
    return total
