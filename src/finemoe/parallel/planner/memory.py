"""Memory of a rank at the height of a step, part by part, for evenly used experts and for uneven ones.

State is exact: float32 weights and gradients, and two moments in float32 or as `Setup.state_bytes` has them, each
spread as the layout says, which reproduces five published figures from one (`published.MEMORY`). Activations are
counted layer by layer, as what each product, norm and attention keeps for its backward. What a process takes at any
rate, `BESIDE`, is an allowance and no count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.planner.bubbles import chunks_held, chunks_of
from finemoe.parallel.planner.setup import Parameters, Piece, Setup, parameters_of, pieces_of_ranks

BESIDE = 3 << 30
"""[bytes] On an accelerator: its context, the libraries' workspaces, buffers of collectives, what lies unused."""
_LOGITS = {"fp32": 1 << 19, "bf16": 1 << 26, "fp8": 1 << 26}  # of a chunk: model.cross_entropy; float32 is a CPU's


@dataclass(frozen=True)
class Memory:
    """[bytes] Of one rank."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    """Weights put together for products, as they travel: two blocks at once, and the root's; or all of them, where they
    are gathered once a step. With them what autocast made of weights, which stays until their backward."""
    whole_gradients: int
    """Gradients before they are summed over processes: of one block; or of all, where that happens once a step."""
    activations: int
    exchange: int
    """Rows on their way to experts and back, of one layer."""
    loss: int
    """A chunk of logits, and the head's gradient beside its place."""
    beside: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """JSON-able."""
        return {**asdict(self), "total": self.total}


def memory_of_ranks(config: ModelConfig, setup: Setup, max_vio: float = 0.0, beside: int = BESIDE) -> list[Memory]:
    """Of each rank of the pipeline; its data, shard and context neighbours are like it.

    Args:
        config: the model.
        setup: how it is run.
        max_vio: (largest - mean) / mean of the rows that a process's experts receive; 0: even. It lengthens the rows of
            the process that receives most, and with them what its experts keep.
        beside: what a process takes at any rate.

    Raises:
        ConfigError: a pipeline of more pieces than blocks.
    """
    return [
        memory_of(config, setup, rank, held, max_vio, beside)
        for rank, held in enumerate(pieces_of_ranks(config, setup))
    ]


def peak_memory(config: ModelConfig, setup: Setup, max_vio: float = 0.0, beside: int = BESIDE) -> Memory:
    """Of the rank that takes most; arguments as of `memory_of_ranks`."""
    return max(memory_of_ranks(config, setup, max_vio, beside), key=lambda memory: memory.total)


def state_bytes(setup: Setup, parameters: Parameters) -> tuple[int, int, int]:
    """Weights, gradients and moments of a rank: its shards of all that its pieces hold."""
    spread, experts = setup.fsdp * setup.tensor, setup.expert * setup.expert_shard
    mine = -(-(parameters.blocks + parameters.root) // spread) + -(-parameters.experts // experts)
    return 4 * mine, 4 * mine, setup.state_bytes * mine


def memory_of(
    config: ModelConfig, setup: Setup, rank: int, held: tuple[Piece, ...], max_vio: float = 0.0, beside: int = BESIDE
) -> Memory:
    """Of one rank of the pipeline, by what it holds; other arguments as of `memory_of_ranks`."""
    parameters = parameters_of(config, held)
    weights, gradients, moments = state_bytes(setup, parameters)
    dense, experts = setup.tensor, setup.expert * setup.tensor
    largest = parameters.largest_block // dense + parameters.largest_experts // experts
    whole = (parameters.blocks + parameters.root) // dense + parameters.experts // experts
    summed = 0 if setup.fsdp == 1 else 4 * (whole if setup.reduce == "step" else largest)
    has_head = any(piece.last for piece in held)
    loss = (4 * (_LOGITS[setup.precision] + config.vocab_size * config.hidden_size // setup.tensor)) if has_head else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        moments=moments,
        gathered=_gathered(setup, parameters),
        whole_gradients=summed,
        activations=activations(config, setup, rank, held, max_vio),
        exchange=_exchange(config, setup, held, max_vio),
        loss=loss,
        beside=beside,
    )


def _gathered(setup: Setup, parameters: Parameters) -> int:
    """Weights beside their pieces."""
    blocks, root = parameters.blocks // setup.tensor, parameters.root // setup.tensor
    experts, width = parameters.experts // (setup.expert * setup.tensor), setup.width
    sharded = setup.fsdp > 1
    cast = 0
    if setup.precision != "fp32" and not (sharded and setup.narrow):
        cast = width * (blocks + root + (0 if sharded else experts))  # experts that are gathered come in 16 bits
    if not sharded:
        return cast
    if setup.gather == "micro_batch":
        blocks = min(2 * parameters.largest_block // setup.tensor, blocks)
        experts = min(2 * parameters.largest_experts // (setup.expert * setup.tensor), experts)
    return setup.stream_width * (blocks + root) + width * experts + cast


def activations(config: ModelConfig, setup: Setup, rank: int, held: tuple[Piece, ...], max_vio: float = 0.0) -> int:
    """[bytes] That micro-batches under way leave on a rank for their backward, and one block's gradients of them."""
    own = [config.blocks[i] for piece in held for i in piece.blocks]
    if any(piece.last for piece in held):
        own += config.mtp
    kept = [_kept(block, config, setup, max_vio) for block in own]
    # A recomputed block keeps its input, and while it goes back all that it would have kept.
    inputs = 4 * config.hidden_size * len(own)
    each, at_work = (inputs, 2 * max(kept)) if setup.recompute else (sum(kept), max(kept))
    stepping = setup.tokens * (each * under_way(setup, rank) + at_work) / setup.tensor
    if not (setup.native and setup.validated):
        return int(stepping)
    # A pass without gradients holds one block's intermediate results: rows of experts out and back, four states.
    wide = 4 * config.hidden_size
    passing = [_kept(block, config, setup, 0.0) + wide * (2 * _copies(block) + 4) for block in own]
    return int(max(stepping, setup.validated * max(passing)))


def _kept(block: BlockConfig, config: ModelConfig, setup: Setup, max_vio: float) -> float:
    if setup.native and setup.expert == 1:
        return kept_natively(block, config.hidden_size, max_vio)
    return kept_bytes(block, config.hidden_size, setup.width, max_vio)


def _copies(block: BlockConfig) -> int:
    return block.feed_forward.experts_per_token if isinstance(block.feed_forward, MoEConfig) else 0


def under_way(setup: Setup, rank: int) -> float:
    """How many micro-batches lie on a rank of the pipeline at once, with all that its pieces keep of one."""
    if setup.pipeline == 1:
        return 1.0
    many = chunks_held(setup.schedule, setup.pipeline, setup.micro_batches, setup.virtual)
    if setup.schedule == "1f1b":
        return float(min(many, setup.pipeline - rank))
    if setup.schedule == "dualpipe":  # its two pieces are of micro-batches from the two ends, one under way at a time
        return many / 2
    return many / chunks_of(setup.schedule, setup.virtual)


def kept_bytes(block: BlockConfig, hidden: int, width: int, max_vio: float = 0.0) -> float:
    """[bytes] That a token leaves in a block until its backward: what each operation of ours saves.

    In float32 to the byte what autograd is seen to hold. In 16 bits the residual stream and its norms stay in float32,
    and each product makes a copy of its input.

    Args:
        block: its configuration.
        hidden: of the model.
        width: [bytes] of a number in products.
        max_vio: how many times more than an even share of rows reaches the experts at hand, less one.
    """
    layer, mixed = block.feed_forward, width < 4
    routes = isinstance(layer, MoEConfig)
    norms = 4 * (4 * hidden + 2)
    reading = (2 if isinstance(block.attention, LatentConfig) else 3) if mixed else 1
    if not isinstance(layer, MoEConfig):
        return (
            norms
            + width * hidden * (reading + 1 + mixed)
            + _attention(block, width)
            + 4 * width * layer.ffn_hidden_size
        )
    shared = layer.num_shared_experts
    reading += (2 * bool(shared) if mixed else 1) + 2 * (mixed and routes)  # the router's copy is in float32
    gate = (hidden + 1) * width if layer.gate_shared_experts else 0
    choice = 4 * layer.num_routed_experts + 12 * layer.experts_per_token
    inner = 4 * width * layer.expert_hidden_size * shared + gate + choice
    copies = copied_bytes(block, hidden, width) * (1 + max_vio)
    return norms + width * hidden * reading + _attention(block, width) + inner + copies


def kept_natively(block: BlockConfig, hidden: int, max_vio: float = 0.0) -> float:
    """`kept_bytes` of our kernels for a CPU: norms keep no second copy, a SwiGLU what its first product gives and no
    more, and experts read states where they lie. To the byte what autograd holds, but for balance losses."""
    layer, attention = block.feed_forward, block.attention
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        ranks = [rank for rank in (attention.q_lora_rank, attention.kv_lora_rank) if rank]
        latents = sum(2 * rank + 1 for rank in ranks) + attention.qk_rope_head_dim
        of_head = 2 * attention.qk_head_dim + attention.qk_nope_head_dim + 2 * attention.v_head_dim + 2
        attending = latents + heads * of_head
    else:
        both = heads + attention.num_kv_heads
        attending = 2 * attention.head_dim * both + 2 * heads
        if attention.qk_norm != "none":
            attending += attention.head_dim * both + (both if attention.qk_norm == "head" else 2)
    if not isinstance(layer, MoEConfig):
        return 4 * (4 * hidden + 2 + attending + 2 * layer.ffn_hidden_size)
    choice = layer.num_routed_experts + 3 * layer.experts_per_token
    gate = (hidden + 1) * layer.gate_shared_experts
    copies = layer.experts_per_token * (1 + max_vio) + layer.num_shared_experts
    return 4 * (4 * hidden + 2 + attending + choice + gate + 2 * layer.expert_hidden_size * copies)


def copied_bytes(block: BlockConfig, hidden: int, width: int) -> float:
    """[bytes] Of them, of a token's copies for routed experts: rows in and out, and what is between.

    Our kernel for float32 computes the activation anew on the way back; grouped products on an accelerator keep it.
    """
    layer = block.feed_forward
    if not isinstance(layer, MoEConfig):
        return 0
    between = 2 if width == 4 else 4
    return width * layer.experts_per_token * (between * layer.expert_hidden_size + 2 * hidden)


def _attention(block: BlockConfig, width: int) -> float:
    """Queries, keys and values of every head, their output twice (once in the order of the product that follows)."""
    attention = block.attention
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        latents = [rank for rank in (attention.q_lora_rank, attention.kv_lora_rank) if rank]
        normed = sum(rank * (8 + width) + 4 for rank in latents) + 4 * attention.qk_rope_head_dim
        values = attention.qk_nope_head_dim + 3 * attention.v_head_dim
        return normed + heads * (width * (2 * attention.qk_head_dim + values) + 4)
    kept = heads * (5 * width * attention.head_dim + 4)
    if attention.qk_norm == "none":
        return kept
    both = heads + attention.num_kv_heads
    scales = both if attention.qk_norm == "head" else 2
    return kept + 4 * (2 * attention.head_dim * both + scales)


def _exchange(config: ModelConfig, setup: Setup, held: tuple[Piece, ...], max_vio: float) -> int:
    """Rows sent and rows received, there and back, of the layer that moves most."""
    if setup.expert == 1:
        return 0
    layers = [config.blocks[i].feed_forward for piece in held for i in piece.blocks]
    layers += [block.feed_forward for block in config.mtp if any(piece.last for piece in held)]
    copies = max((layer.experts_per_token for layer in layers if isinstance(layer, MoEConfig)), default=0)
    rows = setup.tokens * copies / setup.tensor
    return int(2 * rows * (2 + max_vio) * config.hidden_size * setup.width)
