"""The forward path, top to bottom: embed, blocks, norm; the head apart, so that losses can work in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finemoe.model.attention import ATTENTIONS, AttentionCache
from finemoe.model.attention.kernels import ATTENTION_KERNELS
from finemoe.model.config import BlockConfig, Kernels, ModelConfig
from finemoe.model.feed_forward import DenseConfig, SwiGLU
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.moe.experts import EXPERT_KERNELS
from finemoe.model.moe.layer import MoELayer
from finemoe.model.norm import RMSNorm


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns."""

    hidden: Tensor
    """[batch, seq, hidden], after the last norm; `Transformer.logits` turns it into logits."""
    routing: Mapping[int, RoutingRecord]
    """By layer index; dense layers are absent."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlockConfig, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        attention: Any = ATTENTIONS[config.attention.kind][1]
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.attention = attention(config.attention, model.hidden_size, ATTENTION_KERNELS[kernels.attention])
        self.feed_forward_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.feed_forward: SwiGLU | MoELayer
        if isinstance(config.feed_forward, DenseConfig):
            self.feed_forward = SwiGLU(model.hidden_size, config.feed_forward.ffn_hidden_size)
        else:
            kernel = EXPERT_KERNELS[kernels.experts]
            self.feed_forward = MoELayer(config.feed_forward, model.hidden_size, model.vocab_size, kernel)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: AttentionCache | None,
        constraint: RoutingConstraint | None,
        record: bool,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """`hidden [batch, seq, hidden]` in and out; the routing record of an MoE layer."""
        normed = self.attention_norm(hidden)
        hidden = hidden + self.attention(normed, positions=positions, mask=mask, cache=cache)
        normed = self.feed_forward_norm(hidden)
        if isinstance(self.feed_forward, SwiGLU):
            return hidden + self.feed_forward(normed), None
        output, routing = self.feed_forward(normed, tokens, constraint=constraint, record=record)
        return hidden + output, routing


class Transformer(nn.Module):
    """A decoder-only language model. Weights are uninitialised: `initialize` draws them, a checkpoint fills them."""

    def __init__(self, config: ModelConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels or Kernels()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(block, config, self.kernels) for block in config.blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]: the output matrix, which is the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch: int, capacity: int) -> list[AttentionCache]:
        """Empty caches, one a layer, for `batch` rows of at most `capacity` tokens."""
        return [block.attention.new_cache(batch, capacity) for block in self.blocks]  # type: ignore[operator, union-attr]

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Sequence[AttentionCache] | None = None,
        constraint: Mapping[int, RoutingConstraint] | None = None,
        record: bool = False,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            tokens: [batch, seq] int64 ids.
            positions: [batch, seq] int64; 0 ... seq-1 when None.
            documents: [batch, seq] int64; a token attends only to its own document. None: plain causal attention.
            cache: from `new_cache`; keys and values are written at `positions`. The one thing forward mutates.
            constraint: by layer index.
            record: keep the whole routing decision of each layer.

        Raises:
            ValueError: documents together with a cache.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents and cache exclude each other: a cache holds one document a row")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = None if documents is None else _document_mask(documents)
        hidden = self.embedding(tokens)
        routing = {}
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[layer]
            layer_constraint = None if constraint is None else constraint.get(layer)
            inputs = (hidden, tokens, positions, mask, layer_cache, layer_constraint, record)
            if self.kernels.recompute and self.training and torch.is_grad_enabled():
                hidden, routed = checkpoint(block, *inputs, use_reentrant=False)
            else:
                hidden, routed = block(*inputs)
            if routed is not None:
                routing[layer] = routed
        return ModelOutput(self.norm(hidden), routing)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`."""
        return F.linear(hidden, self.head_weight)


def _document_mask(documents: Tensor) -> Tensor:
    """[batch, 1, seq, seq] bool: same document, and not later."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]
