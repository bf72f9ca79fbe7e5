"""Where each tensor of a GGUF file lies in ours, under llama.cpp's names, and how its rows are turned on the way.

Where llama.cpp rotates neighbouring components (`llama`, `deepseek`), files hold queries and keys with the rows of each
head interleaved; ours, like Hugging Face's, are half-split. In `deepseek2` files the up-projection of the latents is
split in two, the keys' part transposed, so that it can be absorbed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.moe.layer import MoEConfig

Turn = Literal["same", "interleaved", "transposed"]
Index = tuple[int | slice, ...]

EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


@final
@dataclass(frozen=True)
class Part:
    """Consecutive rows of one of their tensors, and the contiguous part of ours that they fill."""

    ours: str
    """Key in `Transformer.state_dict()`."""
    shape: tuple[int, ...]
    """Of the part in ours."""
    index: Index = ()
    """Leading index into ours; () is the whole tensor."""
    turn: Turn = "same"
    head_dim: int = 1
    """Rows of a head, where they are interleaved."""

    @property
    def rows(self) -> int:
        """How many rows of theirs."""
        return self.shape[1] if self.turn == "transposed" else math.prod(self.shape[:-1])

    def to_ours(self, rows: Tensor) -> Tensor:
        """`[rows, columns]` of theirs as `shape`."""
        if self.turn == "transposed":
            return rows.t().contiguous()
        if self.turn == "interleaved":
            rows = rows.reshape(-1, self.head_dim // 2, 2, self._width).transpose(1, 2)
        return rows.reshape(self.shape)

    def blocks_to_ours(self, rows: Tensor, size: int) -> Tensor:
        """`[rows, bytes]` of theirs, not transposed, as blocks of `size` bytes of `shape`: rows are moved whole."""
        if self.turn == "interleaved":
            rows = rows.reshape(-1, self.head_dim // 2, 2, rows.shape[-1]).transpose(1, 2)
        return rows.reshape(*self.shape[:-1], -1, size)

    def blocks_to_theirs(self, blocks: Tensor) -> Tensor:
        """The reverse: `[rows, bytes]`."""
        rows = blocks.flatten(-2).reshape(self.rows, -1)
        if self.turn == "interleaved":
            rows = rows.view(-1, 2, self.head_dim // 2, rows.shape[-1]).transpose(1, 2).reshape(self.rows, -1)
        return rows

    def to_theirs(self, part: Tensor) -> Tensor:
        """A part of `shape` as `[rows, columns]` of theirs."""
        if self.turn == "transposed":
            return part.t().contiguous()
        if self.turn == "interleaved":
            part = part.reshape(-1, 2, self.head_dim // 2, self._width).transpose(1, 2)
        return part.reshape(self.rows, -1)

    @property
    def _width(self) -> int:
        """Elements of a row; a bias has one to a row."""
        return self.shape[1] if len(self.shape) > 1 else 1


@final
@dataclass(frozen=True)
class Stacked:
    """A tensor of theirs that is cut along its first dimension, one piece for each head or expert of ours."""

    ours: str
    turn: Turn
    whole: int
    """Rows of ours in each head; 0: ours is stacked by expert."""
    first: int | None
    """Where the piece begins within head or expert; None: it is all of it."""

    def parts(self, shape: tuple[int, ...]) -> Iterator[Part]:
        """In the order of their rows."""
        count, rows, columns = shape
        if self.turn == "transposed":
            rows, columns = columns, rows
        for at in range(count):
            if self.whole:
                start = at * self.whole + (self.first or 0)
                index: Index = (slice(start, start + rows),)
            else:
                index = (at,) if self.first is None else (at, slice(self.first, self.first + rows))
            yield Part(self.ours, (rows, columns), index, self.turn)


@final
@dataclass(frozen=True)
class Stored:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch has it."""
    source: Part | Stacked
    precise: bool = False
    """Always F32: norms, biases, and the router, where rounding changes which experts win."""

    def parts(self) -> Iterator[Part]:
        """What its rows fill, in their order."""
        if isinstance(self.source, Part):
            yield self.source
        else:
            yield from self.source.parts(self.shape)

    @property
    def lies_whole(self) -> bool:
        """Whether its rows are those of a whole tensor of ours, in their order."""
        source = self.source
        if isinstance(source, Part):
            return source.turn == "same" and not source.index
        return source.turn == "same" and not source.whole and source.first is None


@dataclass(frozen=True)
class Variants:
    """In what form a file holds what can be held in several; the defaults are what is written."""

    split_latent: bool = True
    """attn_k_b and attn_v_b, not attn_kv_b."""
    fused_experts: bool = False
    """ffn_gate_up_exps, not ffn_gate_exps and ffn_up_exps."""
    single_experts: bool = False
    """A tensor for each expert, as before April 2024."""
    selection_bias: bool = True
    """A file may leave out biases that are all 0."""
    neighbours: bool = True
    """llama.cpp turns neighbouring components of a head, so half-split rows are interleaved."""


def stored_tensors(config: ModelConfig, variants: Variants = Variants()) -> Iterator[Stored]:
    """Every tensor of a file of this model; MTP modules have no place in one."""
    wide = (config.vocab_size, config.hidden_size)
    yield _whole(EMBEDDING, "embedding.weight", wide)
    for layer, block in enumerate(config.blocks):
        yield from _block(layer, block, config.hidden_size, variants)
    yield _whole("output_norm.weight", "norm.weight", (config.hidden_size,))
    if not config.tie_embeddings:
        yield _whole(OUTPUT, "head.weight", wide)


def _whole(name: str, ours: str, shape: tuple[int, ...], *, precise: bool = False) -> Stored:
    return Stored(name, shape, Part(ours, shape), precise or len(shape) == 1)


def _block(layer: int, block: BlockConfig, hidden: int, variants: Variants) -> Iterator[Stored]:
    theirs, ours = f"blk.{layer}.", f"blocks.{layer}."
    yield _whole(f"{theirs}attn_norm.weight", f"{ours}attention_norm.weight", (hidden,))
    if isinstance(block.attention, GroupedQueryConfig):
        yield from _grouped_query(theirs, f"{ours}attention.", block.attention, hidden, variants)
    else:
        yield from _latent(theirs, f"{ours}attention.", block.attention, hidden, variants)
    yield _whole(f"{theirs}ffn_norm.weight", f"{ours}feed_forward_norm.weight", (hidden,))
    if isinstance(block.feed_forward, DenseConfig):
        width = block.feed_forward.ffn_hidden_size
        yield from _swiglu(theirs, "", f"{ours}feed_forward.", hidden, width)
    else:
        yield from _experts(theirs, f"{ours}feed_forward.", block.feed_forward, hidden, variants)


def _grouped_query(
    theirs: str, ours: str, config: GroupedQueryConfig, hidden: int, variants: Variants
) -> Iterator[Stored]:
    head_dim = config.head_dim
    turn: Turn = "interleaved" if config.rope.layout == "half_split" and variants.neighbours else "same"
    sizes = {"q": config.num_heads * head_dim, "k": config.num_kv_heads * head_dim, "v": config.num_kv_heads * head_dim}
    for letter, size in sizes.items():
        rotary: Turn = turn if letter != "v" else "same"
        for kind, shape in (("weight", (size, hidden)), ("bias", (size,))):
            if kind == "weight" or config.qkv_bias:
                part = Part(f"{ours}{letter}_proj.{kind}", shape, (), rotary, head_dim)
                yield Stored(f"{theirs}attn_{letter}.{kind}", shape, part, kind == "bias")
    yield _whole(f"{theirs}attn_output.weight", f"{ours}o_proj.weight", (hidden, sizes["q"]))
    for letter, width in zip("qk", config.norm_sizes(), strict=False):
        yield _whole(f"{theirs}attn_{letter}_norm.weight", f"{ours}{letter}_norm.weight", (width,))


def _latent(theirs: str, ours: str, config: LatentConfig, hidden: int, variants: Variants) -> Iterator[Stored]:
    heads, latent = config.num_heads, config.kv_lora_rank
    plain, value = config.qk_nope_head_dim, config.v_head_dim
    queries, rank = heads * config.qk_head_dim, config.q_lora_rank
    if rank is None:
        yield _whole(f"{theirs}attn_q.weight", f"{ours}q_proj.weight", (queries, hidden))
    else:
        yield _whole(f"{theirs}attn_q_a.weight", f"{ours}q_down_proj.weight", (rank, hidden))
        yield _whole(f"{theirs}attn_q_a_norm.weight", f"{ours}q_norm.weight", (rank,))
        yield _whole(f"{theirs}attn_q_b.weight", f"{ours}q_proj.weight", (queries, rank))
    down = (latent + config.qk_rope_head_dim, hidden)
    yield _whole(f"{theirs}attn_kv_a_mqa.weight", f"{ours}kv_down_proj.weight", down)
    yield _whole(f"{theirs}attn_kv_a_norm.weight", f"{ours}kv_norm.weight", (latent,))
    up, whole = f"{ours}kv_up_proj.weight", plain + value
    if variants.split_latent:
        yield Stored(f"{theirs}attn_k_b.weight", (heads, latent, plain), Stacked(up, "transposed", whole, 0))
        yield Stored(f"{theirs}attn_v_b.weight", (heads, value, latent), Stacked(up, "same", whole, plain))
    else:
        yield _whole(f"{theirs}attn_kv_b.weight", up, (heads * whole, latent))
    yield _whole(f"{theirs}attn_output.weight", f"{ours}o_proj.weight", (hidden, heads * value))


def _swiglu(theirs: str, suffix: str, ours: str, hidden: int, width: int) -> Iterator[Stored]:
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield _whole(f"{theirs}ffn_{name}{suffix}.weight", f"{ours}{name}_proj.weight", shape)


def _experts(theirs: str, ours: str, config: MoEConfig, hidden: int, variants: Variants) -> Iterator[Stored]:
    count, width = config.num_routed_experts, config.expert_hidden_size
    yield _whole(f"{theirs}ffn_gate_inp.weight", f"{ours}router.weight", (count, hidden), precise=True)
    if config.router.selects_with_bias and variants.selection_bias:
        yield _whole(f"{theirs}exp_probs_b.bias", f"{ours}router.selection_bias", (count,))
    gate_up, down = f"{ours}experts.gate_up_proj", f"{ours}experts.down_proj"
    if variants.single_experts:
        for expert in range(count):
            for name, part in (
                ("gate", Part(gate_up, (width, hidden), (expert, slice(0, width)))),
                ("up", Part(gate_up, (width, hidden), (expert, slice(width, 2 * width)))),
                ("down", Part(down, (hidden, width), (expert,))),
            ):
                yield Stored(f"{theirs}ffn_{name}.{expert}.weight", part.shape, part)
    elif variants.fused_experts:
        shape = (count, 2 * width, hidden)
        yield Stored(f"{theirs}ffn_gate_up_exps.weight", shape, Stacked(gate_up, "same", 0, None))
    else:
        shape = (count, width, hidden)
        yield Stored(f"{theirs}ffn_gate_exps.weight", shape, Stacked(gate_up, "same", 0, 0))
        yield Stored(f"{theirs}ffn_up_exps.weight", shape, Stacked(gate_up, "same", 0, width))
    if not variants.single_experts:
        yield Stored(f"{theirs}ffn_down_exps.weight", (count, hidden, width), Stacked(down, "same", 0, None))
    if config.num_shared_experts:
        yield from _swiglu(theirs, "_shexp", f"{ours}shared_experts.", hidden, config.num_shared_experts * width)
    if config.gate_shared_experts:
        gate = Part(f"{ours}shared_gate.weight", (1, hidden))
        yield Stored(f"{theirs}ffn_gate_inp_shexp.weight", (hidden,), gate, precise=True)
