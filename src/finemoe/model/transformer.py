"""The forward path, top to bottom: embed, blocks, norm; the head apart, so that losses can work in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finemoe.model.attention import ATTENTIONS, AttentionCache
from finemoe.model.attention.kernels import ATTENTION_KERNELS
from finemoe.model.attention.places import Places, within_documents
from finemoe.model.config import BlockConfig, Kernels, ModelConfig
from finemoe.model.feed_forward import DenseConfig, SwiGLU
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.moe.experts import EXPERT_KERNELS
from finemoe.model.moe.layer import MoELayer
from finemoe.model.native import Native, usable
from finemoe.model.native.linear import linear
from finemoe.model.norm import RMSNorm
from finemoe.model.projection import Projection, TokenEmbedding


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns."""

    hidden: Tensor
    """[batch, seq, hidden], after the last norm; `Transformer.logits` turns it into logits."""
    routing: Mapping[int, RoutingRecord]
    """By layer index; dense layers are absent. The module of MTP depth k counts as layer num_layers + k - 1."""
    mtp_hidden: tuple[Tensor, ...] = ()
    """[batch, seq - k, hidden] of the module of each depth k, ready for `Transformer.logits`; when asked for."""
    states: tuple[Tensor, ...] = ()
    """[batch, seq, hidden] before each block that ran; when asked for."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BlockConfig, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        attention: Any = ATTENTIONS[config.attention.kind][1]
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps)
        attend = ATTENTION_KERNELS[kernels.attention]
        self.attention = attention(config.attention, model.hidden_size, model.norm_eps, attend)
        self.feed_forward_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.feed_forward: SwiGLU | MoELayer
        if isinstance(config.feed_forward, DenseConfig):
            dense = config.feed_forward
            self.feed_forward = SwiGLU(model.hidden_size, dense.ffn_hidden_size, dense.swiglu_limit)
        else:
            kernel = EXPERT_KERNELS[kernels.experts]
            self.feed_forward = MoELayer(config.feed_forward, model.hidden_size, model.vocab_size, kernel)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        places: Places,
        cache: AttentionCache | None,
        constraint: RoutingConstraint | None,
        record: bool,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """`hidden [batch, seq, hidden]` in and out; the routing record of an MoE layer."""
        normed = self.attention_norm(hidden)
        hidden = hidden + self.attention(normed, places=places, cache=cache)
        normed = self.feed_forward_norm(hidden)
        if isinstance(self.feed_forward, SwiGLU):
            return hidden + self.feed_forward(normed), None
        output, routing = self.feed_forward(normed, tokens, constraint=constraint, record=record)
        return hidden + output, routing


class MTPModule(nn.Module):
    """One depth of multi-token prediction (V3 Eq. 21-23): the state so far and the next token's embedding, one block.

    The projection reads the embedding first, then the state: the order of the released weights, not of Eq. 21.
    """

    def __init__(self, config: BlockConfig, model: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.hidden_norm = RMSNorm(model.hidden_size, model.norm_eps)
        self.projection = Projection(2 * model.hidden_size, model.hidden_size)
        self.block = Block(config, model, kernels)
        self.norm = RMSNorm(model.hidden_size, model.norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """`hidden [batch, seq, hidden]` and the embeddings of the tokens that follow: the input of the block."""
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        output: Tensor = self.projection(joined)
        return output


class Transformer(Native, nn.Module):
    """A decoder-only language model. Weights are uninitialised: `initialize` draws them, a checkpoint fills them."""

    def __init__(self, config: ModelConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels or Kernels()
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(block, config, self.kernels) for block in config.blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mtp = nn.ModuleList(MTPModule(block, config, self.kernels) for block in config.mtp)
        self.head = None if config.tie_embeddings else Projection(config.hidden_size, config.vocab_size)
        self.use_native(self.kernels.products != "torch")

    def use_native(self, wanted: bool) -> None:
        """Whether modules that have a native path take it where they can."""
        for module in self.modules():
            if isinstance(module, Native):
                module.native = wanted

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]: the output matrix, which is the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The layers that route, numbered as in `ModelOutput.routing`."""
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        layers = {number: block.feed_forward for number, block in enumerate(blocks)}  # type: ignore[union-attr]
        return {number: layer for number, layer in layers.items() if isinstance(layer, MoELayer)}

    def new_cache(self, batch: int, capacity: int) -> list[AttentionCache]:
        """Empty caches, one a layer of the main model, for `batch` rows of at most `capacity` tokens."""
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
        mtp: bool = False,
        states: bool = False,
        start: tuple[int, Tensor] | None = None,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            tokens: [batch, seq] int64 ids.
            positions: [batch, seq] int64; 0 ... seq-1 when None.
            documents: [batch, seq] int64; a token attends only to its own, a run of equal ids. None: plain causal
                attention.
            cache: from `new_cache`; keys and values are written at `positions`. The one thing forward mutates.
            constraint: by layer index.
            record: keep the whole routing decision of each layer.
            mtp: run the multi-token prediction modules too; needs whole sequences, so no cache.
            states: keep what every block was given.
            start: a block and what it is given, from the `states` of an earlier pass: go on from there. What came
                before is neither run nor recorded.

        Raises:
            ValueError: documents or mtp together with a cache; mtp of sequences too short for its depth.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents and cache exclude each other: a cache holds one document a row")
        if mtp and cache is not None:
            raise ValueError("mtp and cache exclude each other: the modules read whole sequences")
        if mtp and tokens.shape[1] <= len(self.mtp):
            raise ValueError(f"mtp of depth {len(self.mtp)} needs sequences of more than {tokens.shape[1]} tokens")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        places = Places(positions, None if documents is None else within_documents(documents))
        first, hidden = (0, self.embedding(tokens)) if start is None else start
        routing: dict[int, RoutingRecord] = {}
        given: list[Tensor] = []
        for layer, block in enumerate(list(self.blocks)[first:], first):
            if states:
                given.append(hidden)
            layer_cache = None if cache is None else cache[layer]
            layer_constraint = None if constraint is None else constraint.get(layer)
            inputs = (hidden, tokens, places, layer_cache, layer_constraint, record)
            hidden = self._block(block, layer, inputs, routing)
        output = self.norm(hidden)
        ahead = self._ahead(output, tokens, places, constraint, record, routing) if mtp else ()
        return ModelOutput(output, routing, tuple(ahead), tuple(given))

    def _block(self, block: nn.Module, layer: int, inputs: Sequence[Any], routing: dict[int, RoutingRecord]) -> Tensor:
        """Run one block, recomputed in the backward pass where wanted; its routing record goes into `routing`."""
        if self.kernels.recompute and self.training and torch.is_grad_enabled():
            hidden, routed = checkpoint(block, *inputs, use_reentrant=False)
        else:
            hidden, routed = block(*inputs)
        if routed is not None:
            routing[layer] = routed
        result: Tensor = hidden
        return result

    def _ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        places: Places,
        constraint: Mapping[int, RoutingConstraint] | None,
        record: bool,
        routing: dict[int, RoutingRecord],
    ) -> Iterator[Tensor]:
        """The hidden states of every MTP depth, each one token shorter than the one before."""
        for depth, module in enumerate(self.mtp, 1):
            length = tokens.shape[1] - depth
            layer = len(self.blocks) + depth - 1
            following = tokens[:, depth:]  # the token that state i may read at this depth is i + depth
            joined = module(hidden[:, :length], self.embedding(following))
            layer_constraint = None if constraint is None else constraint.get(layer)
            inputs = (joined, following, places.cut(length), None, layer_constraint, record)
            hidden = self._block(module.block, layer, inputs, routing)  # type: ignore[arg-type, union-attr]
            yield module.norm(hidden)  # type: ignore[operator, union-attr]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`."""
        if self.native and usable(hidden, self.head_weight):
            return linear(hidden, self.head_weight)
        return F.linear(hidden, self.head_weight)
