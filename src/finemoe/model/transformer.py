"""The forward path, top to bottom: embed, blocks, norm; the head apart, so that losses can work in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finemoe.model.attention import ATTENTIONS, AttentionCache
from finemoe.model.attention.blocks import Group
from finemoe.model.attention.places import Places, piece_of, within_documents
from finemoe.model.backend import Backend
from finemoe.model.backends import backend_for
from finemoe.model.config import BlockConfig, Kernels, ModelConfig
from finemoe.model.feed_forward import DenseConfig, SwiGLU
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.moe.layer import MoELayer
from finemoe.model.norm import RMSNorm
from finemoe.model.one_call import Parts, in_one_call
from finemoe.model.projection import Projection, TokenEmbedding
from finemoe.model.quantised.blocks import in_float32
from finemoe.model.sequences import Context, Sequences


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

    def __init__(self, config: BlockConfig, model: ModelConfig, backend: Backend) -> None:
        super().__init__()
        attention: Any = ATTENTIONS[config.attention.kind][1]
        self.backend = backend
        self.attention_norm = RMSNorm(model.hidden_size, model.norm_eps, backend)
        self.attention = attention(config.attention, model.hidden_size, model.norm_eps, backend)
        self.feed_forward_norm = RMSNorm(model.hidden_size, model.norm_eps, backend)
        self.feed_forward: SwiGLU | MoELayer
        if isinstance(config.feed_forward, DenseConfig):
            dense = config.feed_forward
            self.feed_forward = SwiGLU(model.hidden_size, dense.ffn_hidden_size, backend, dense.swiglu_limit)
        else:
            self.feed_forward = MoELayer(config.feed_forward, model.hidden_size, model.vocab_size, backend)
        self.routes = isinstance(self.feed_forward, MoELayer)

    def parts(self, cache: AttentionCache) -> Parts:
        """What the block computes with over this cache, for one call; kept there."""
        known: Parts | None = cache.known.get(self)
        if known is None or not known.still_hold:
            attention, feed_forward = self.attention.parts(cache), self.feed_forward.parts()
            found = None
            if attention is not None and feed_forward is not None:
                norms = (self.attention_norm, self.feed_forward_norm)
                first, second = ((norm.weight, norm.eps) for norm in norms)
                found = (*first, *attention, *second, self.routes, *feed_forward)
            cache.known[self] = known = Parts(self, found)
        return known

    def where(self, places: Places) -> tuple[Tensor | None, ...] | None:
        """Where the tokens of a pass stand, as its attention wants to know it for one call; None where it cannot."""
        found: tuple[Tensor | None, ...] | None = self.attention.where(places)
        return found

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
        layer: MoELayer = self.feed_forward
        output, routing = layer(normed, tokens, constraint=constraint, record=record, sequences=places.sequences)
        return hidden + output, routing


class MTPModule(nn.Module):
    """One depth of multi-token prediction (V3 Eq. 21-23): the state so far and the next token's embedding, one block.

    The projection reads the embedding first, then the state: the order of the released weights, not of Eq. 21.
    """

    def __init__(self, config: BlockConfig, model: ModelConfig, backend: Backend, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding_norm = RMSNorm(model.hidden_size, model.norm_eps, backend)
        self.hidden_norm = RMSNorm(model.hidden_size, model.norm_eps, backend)
        self.projection = Projection(2 * model.hidden_size, model.hidden_size, backend)
        self.block = Block(config, model, backend)
        self.norm = RMSNorm(model.hidden_size, model.norm_eps, backend)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        tokens: Tensor,
        places: Places,
        constraint: RoutingConstraint | None,
        record: bool,
        cache: AttentionCache | None = None,
    ) -> tuple[Tensor, Tensor, RoutingRecord | None]:
        """`hidden [batch, seq, hidden]`, and embeddings and ids of the tokens that follow.

        Returns the state that the next depth reads, the same after the last norm, and the block's routing record.
        """
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        inputs = self.projection(joined)
        few = cache is not None and constraint is None and not record
        whole = in_one_call([self.block], inputs, places, [cache]) if cache is not None and few else None
        if whole is not None:
            output, (routed,) = whole
        else:
            output, routed = run_block(self.block, self.recompute, inputs, tokens, places, cache, constraint, record)
        return output, self.norm(output), routed


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> tuple[Tensor, RoutingRecord | None]:
    """`Block.forward`, run again in the backward pass where wanted instead of keeping its activations."""
    if recompute and block.training and torch.is_grad_enabled():
        again: tuple[Tensor, RoutingRecord | None] = checkpoint(block, *inputs, use_reentrant=False)
        return again
    once: tuple[Tensor, RoutingRecord | None] = block(*inputs)
    return once


class Transformer(nn.Module):
    """A decoder-only language model. Weights are uninitialised: `initialize` draws them, a checkpoint fills them."""

    def __init__(self, config: ModelConfig, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels or Kernels()
        self.backend = backend_for(self.kernels)
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(block, config, self.backend) for block in config.blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, self.backend)
        recompute = self.kernels.recompute
        self.mtp = nn.ModuleList(MTPModule(block, config, self.backend, recompute) for block in config.mtp)
        self.context: Context | None = None
        """In training: where the rest of every row is, which the forward pass is then given a piece of."""
        tied = config.tie_embeddings
        self.head = None if tied else Projection(config.hidden_size, config.vocab_size, self.backend)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]: the output matrix, which is the embedding when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def head_rows(self, ids: Sequence[int] | slice) -> Tensor:
        """Rows of the output matrix, `[ids, hidden]`: numbers, also where it is blocks."""
        rows = self.head_weight[ids if isinstance(ids, slice) else list(ids)]
        return in_float32(rows, self.config.hidden_size)

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The layers that route, numbered as in `ModelOutput.routing`."""
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        layers = {number: block.feed_forward for number, block in enumerate(blocks)}  # type: ignore[union-attr]
        return {number: layer for number, layer in layers.items() if isinstance(layer, MoELayer)}

    def new_cache(self, batch: int, capacity: int) -> list[AttentionCache]:
        """Empty caches, one a layer of the main model, for `batch` rows of at most `capacity` tokens."""
        return [block.attention.new_cache(batch, capacity) for block in self.blocks]  # type: ignore[operator, union-attr]

    def new_blocks(self, count: int, size: int, dtype: torch.dtype | None = None) -> list[AttentionCache]:
        """Empty caches of `count` blocks of `size` tokens, which many sequences share; layers as in `moe_layers`.

        The multi-token prediction modules have theirs behind the main model's. `dtype` may be narrower than the
        weights', such as torch.bfloat16 or torch.float8_e4m3fn; None: theirs.
        """
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        return [block.attention.new_cache(count, size, dtype) for block in blocks]  # type: ignore[operator, union-attr]

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        by_document: bool = False,
        cache: Sequence[AttentionCache] | None = None,
        groups: Sequence[Group] = (),
        constraint: Mapping[int, RoutingConstraint] | None = None,
        record: bool = False,
        mtp: bool = False,
        states: bool = False,
        start: tuple[int, Tensor] | None = None,
        stop: int | None = None,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            tokens: [batch, seq] int64 ids.
            positions: [batch, seq] int64; 0 ... seq-1 when None.
            documents: [batch, seq] int64; a token attends only to its own, a run of equal ids. None: plain causal
                attention.
            by_document: the only row holds documents that have nothing to do with each other, numbered from 0 in
                order: what is counted and balanced is what they would come to alone.
            cache: from `new_cache`; keys and values are written at `positions`. The one thing forward mutates.
            groups: the pass is flat, [1, tokens], and the cache is from `new_blocks`: whose tokens stand where.
            constraint: by layer index.
            record: keep the whole routing decision of each layer.
            mtp: run the multi-token prediction modules too; needs whole sequences, so no cache.
            states: keep what every block was given.
            start: a block and what it is given, from the `states` of an earlier pass: go on from there. What came
                before is neither run nor recorded.
            stop: end before this block; `hidden` of the output is what it would be given, without the last norm.

        Raises:
            ValueError: documents or mtp together with a cache; mtp of sequences too short for its depth; by_document
                without documents in a single row.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents and cache exclude each other: a cache holds one document a row")
        if mtp and cache is not None:
            raise ValueError("mtp and cache exclude each other: the modules read whole sequences")
        if mtp and tokens.shape[1] <= len(self.mtp):
            raise ValueError(f"mtp of depth {len(self.mtp)} needs sequences of more than {tokens.shape[1]} tokens")
        if by_document and (documents is None or len(tokens) != 1):
            raise ValueError("by_document needs documents, in a single row")
        places = self._places(tokens, positions, documents, by_document, groups)
        first, hidden = (0, self.embedding(tokens)) if start is None else start
        given: list[Tensor] | None = [] if states else None
        span = slice(first, len(self.blocks) if stop is None else stop)
        hidden, routing = self._through(span, hidden, tokens, places, cache, constraint, record, given)
        output = self.norm(hidden) if stop is None else hidden
        ahead = self._ahead(output, tokens, places, constraint, record, routing) if mtp else ()
        return ModelOutput(output, routing, tuple(ahead), tuple(given or ()))

    def _places(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        by_document: bool,
        groups: Sequence[Group],
    ) -> Places:
        """Where the tokens of a pass stand, and what they see."""
        length, context = tokens.shape[1], self.context if self.training else None
        if positions is None:
            start = 0 if context is None else context.piece * length
            positions = torch.arange(start, start + length, device=tokens.device).expand_as(tokens)
        if context is not None:
            return piece_of(positions, documents, context)
        sequences = Sequences.documents(documents) if by_document and documents is not None else None
        return Places(positions, None if documents is None else within_documents(documents), groups, sequences)

    def _through(
        self,
        span: slice,
        hidden: Tensor,
        tokens: Tensor,
        places: Places,
        cache: Sequence[AttentionCache] | None,
        constraint: Mapping[int, RoutingConstraint] | None,
        record: bool,
        given: list[Tensor] | None,
    ) -> tuple[Tensor, dict[int, RoutingRecord]]:
        """The blocks of `span`: what comes out, and what was routed. `given`: keep what each was given."""
        blocks: list[Any] = list(self.blocks)[span]
        if cache is not None and constraint is None and not record and given is None:
            few = in_one_call(blocks, hidden, places, cache[span])
            if few is not None:
                return few[0], {layer: one for layer, one in enumerate(few[1], span.start) if one is not None}
        routing: dict[int, RoutingRecord] = {}
        for layer, block in enumerate(blocks, span.start):
            if given is not None:
                given.append(hidden)
            own = (None if cache is None else cache[layer], None if constraint is None else constraint.get(layer))
            hidden, routed = run_block(block, self.kernels.recompute, hidden, tokens, places, *own, record)
            if routed is not None:
                routing[layer] = routed
        return hidden, routing

    def _ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        places: Places,
        constraint: Mapping[int, RoutingConstraint] | None,
        record: bool,
        routing: dict[int, RoutingRecord],
    ) -> Iterator[Tensor]:
        """The hidden states of every MTP depth, each one token shorter than the one before, of every document."""
        for depth, module in enumerate(self.mtp, 1):
            layer = len(self.blocks) + depth - 1
            layer_constraint = None if constraint is None else constraint.get(layer)
            # The token that state i may read at this depth is i + depth.
            hidden, following, here = _one_further(hidden, tokens, places, depth)
            inputs = (following, here, layer_constraint, record)
            hidden, normed, routed = module(hidden, self.embedding(following), *inputs)
            if routed is not None:
                routing[layer] = routed
            yield normed

    def ahead(
        self,
        hidden: Tensor,
        following: Tensor,
        groups: Sequence[Group],
        cache: Sequence[AttentionCache],
        depth: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """One multi-token prediction module over a flat pass, with a cache of its own (V3 section 2.2.3).

        Args:
            hidden: [1, tokens, hidden], what the module reads of every token: of depth 1 `ModelOutput.hidden`, else the
                first result of the depth before it, or of this one, which may be run again to look further ahead.
            following: [1, tokens] int64, the token after each.
            groups: whose tokens stand where, as in `forward`.
            cache: from `new_blocks`.
            depth: which module, from 1.

        Returns:
            The state that goes on, and the same after the last norm, ready for `logits` of the token after `following`.
        """
        positions = torch.cat([group.positions.flatten() for group in groups])[None]
        own = cache[len(self.blocks) + depth - 1]
        places = Places(positions, groups=groups)
        embedded = self.embedding(following)
        output, normed, _ = self.mtp[depth - 1](hidden, embedded, following, places, None, False, own)
        return output, normed

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`."""
        return self.backend.linear(hidden, self.head_weight, None)


def _one_further(hidden: Tensor, tokens: Tensor, places: Places, depth: int) -> tuple[Tensor, Tensor, Places]:
    """What the module of a depth reads: states of the depth before, the token `depth` further on, where they stand.

    With documents apart, those states alone whose document goes on for so long.
    """
    length = tokens.shape[1] - depth
    if places.sequences is None:
        return hidden[:, :length], tokens[:, depth:], places.cut(length)
    of = places.sequences.of
    assert of is not None
    goes_on = of[depth:] == of[:length]
    before = of[depth - 1 :] == of[: length + 1]  # the states that there are
    keep = goes_on.new_zeros(len(of))
    keep[:length] = goes_on
    index = keep.nonzero()[:, 0]
    sequences = places.sequences.cut(keep)
    here = Places(places.positions[:, index], within_documents(of[None, index]), sequences=sequences)
    return hidden[:, keep[: length + 1][before]], tokens[:, index + depth], here
