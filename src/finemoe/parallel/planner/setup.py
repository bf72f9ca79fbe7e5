"""How one run is laid out: the question that a plan answers. And which blocks lie on which rank of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.bubbles import chunks_of
from finemoe.parallel.planner.devices import Precision
from finemoe.parallel.planner.flops import block_flops, head_flops, module_flops
from finemoe.parallel.planner.schedules import Schedule, require

When = Literal["micro_batch", "step"]


def at_once(sequences: int, data: int, most: int) -> int:
    """Sequences of a micro-batch: `most`, or the share that a step's sequences leave to each of `data` processes."""
    return min(most, max(1, sequences // data))


@dataclass(frozen=True)
class Setup:
    """One run: its layout, its batch, its precision."""

    sequences: int
    """[sequences] A step, of all processes."""
    seq_len: int
    micro_batch: int = 1
    """[sequences] Of one process at once; the last of a step may have fewer."""
    precision: Precision = "bf16"
    """Of products. Weights and gradients are kept in float32 whatever it is, moments as `state_bytes` says."""
    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    schedule: Schedule = "1f1b"
    virtual: int = 1
    """[chunks] A rank, for the interleaved schedule."""
    tensor: int = 1
    """[processes] That share every product. finemoe has none of it: for the published runs that do."""
    recompute: bool = False
    """Blocks keep their input alone, and run forward once more before they go back."""
    gather: When = "micro_batch"
    """How often sharded weights are gathered: for each micro-batch, forward and back, or once a step, and kept."""
    reduce: When = "micro_batch"
    """How often gradients are summed over processes: after each micro-batch, or kept whole until the step's end."""
    state_bytes: int = 8
    """[bytes] Of the optimizer, a parameter: 8 for two moments in float32, 4 for two in bfloat16 or one in float32."""
    once_a_node: bool = False
    """A row crosses the network once for all its experts on a node (DeepEP and its kind). finemoe sends every copy."""
    narrow: bool = False
    """Weights and states between stages travel in 16 bits, as where both are kept so (Megatron, DeepSeek). finemoe's
    residual stream is in float32, and all weights but routed experts' travel so; those are for products alone."""
    native: bool = False
    """By finemoe's own kernels for a CPU, in float32, which keep less for the backward pass where no row travels."""
    validated: int = 0
    """[tokens] Of one pass when a run by our kernels is measured, which may take more than a step; 0: not asked."""
    graphs: bool = False
    """The host replays recorded launches (CUDA graphs), and computing never waits for it. finemoe does not."""

    def __post_init__(self) -> None:
        if self.sequences % self.data:
            raise ConfigError(
                f"{self.sequences} sequences a step cannot be shared out: parallel.replicate {self.replicate} x shard "
                f"{self.shard} are {self.data} processes; make training.tokens_per_step a multiple of "
                f"{self.data * self.seq_len:,} tokens"
            )
        if (self.fsdp * self.tensor) % self.expert:
            raise ConfigError(
                f"parallel.expert {self.expert} does not divide the {self.fsdp * self.tensor} processes of a copy"
            )
        if self.seq_len % self.context:
            raise ConfigError(f"parallel.context {self.context} does not divide sequences of {self.seq_len} tokens")
        require(self.schedule, self.pipeline, self.micro_batches, self.virtual)

    @classmethod
    def of(cls, layout: Layout, **rest: Any) -> Setup:
        """The setup of a layout of `[parallel]`; `rest` is what a layout does not say."""
        sizes = {name: getattr(layout, name) for name in ("pipeline", "replicate", "shard", "context", "expert")}
        virtual = 2 if layout.schedule == "interleaved" else 1
        return cls(**sizes, schedule=layout.schedule, virtual=virtual, **rest)

    @property
    def data(self) -> int:
        """Processes, or groups of them, with sequences of their own."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Over how many processes a weight that is no routed expert's is spread."""
        return self.shard * self.context

    @property
    def expert_shard(self) -> int:
        """Over how many the experts that lie on one process are spread further."""
        return max(1, self.fsdp * self.tensor // self.expert)

    @property
    def processes(self) -> int:
        """All."""
        return self.pipeline * self.replicate * self.shard * self.context * self.tensor

    @property
    def micro_batches(self) -> int:
        """Of one process, a step."""
        return -(-self.sequences // (self.data * self.micro_batch))

    @property
    def full_micro_batches(self) -> float:
        """How many whole ones of them hold as many tokens: fewer where the last is smaller."""
        return self.sequences / (self.data * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Of one process in one micro-batch; processes that share every product have all its tokens each."""
        return self.micro_batch * self.seq_len // self.context

    @property
    def tokens_per_step(self) -> int:
        """Of all processes."""
        return self.sequences * self.seq_len

    @property
    def width(self) -> int:
        """[bytes] Of a number as products take and make it, and of what is made of it: in FP8 of all but rows."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream_width(self) -> int:
        """[bytes] Of a number of the residual stream, and of weights that are no routed expert's, as they travel."""
        return self.width if self.narrow else 4

    @property
    def batch(self) -> str:
        """In words: of a step, and of a process at once."""
        pieces = "1 micro-batch" if self.micro_batches == 1 else f"{self.micro_batches:,} micro-batches"
        many = "1 sequence" if self.sequences == 1 else f"{self.sequences:,} sequences"
        return (
            f"a batch of {many} of {self.seq_len:,} tokens, of which each process takes {self.micro_batch:,} at once "
            f"({pieces} a step)"
        )

    def __str__(self) -> str:
        """In words, those above 1."""
        names = ("pipeline", "replicate", "shard", "context", "expert", "tensor")
        said = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1]
        if self.pipeline > 1:
            said[0] += f" ({self.schedule}{f' x {self.virtual}' if self.virtual > 1 else ''})"
        said += ["recompute"] * self.recompute + ["weights gathered once a step"] * (self.gather == "step")
        return ", ".join(said) or "one process"


@dataclass(frozen=True)
class Piece:
    """What one chunk of a pipeline holds."""

    blocks: tuple[int, ...]
    first: bool
    """With the embedding."""
    last: bool
    """With the head, the last norm and the multi-token prediction modules."""


def pieces(config: ModelConfig, count: int, seq_len: int) -> tuple[Piece, ...]:
    """Cut a model into `count` consecutive pieces, as equal in FLOPs as whole blocks allow.

    Raises:
        ConfigError: fewer blocks than pieces.
    """
    blocks = len(config.blocks)
    if count > blocks:
        raise ConfigError(
            f"parallel.pipeline: {count} pieces of a model of {blocks} blocks would leave some without any; at most "
            f"{blocks} pieces (two of them a rank for zbv and dualpipev, or as many as virtual stages)"
        )
    costs = [block_flops(block, config.hidden_size, seq_len).total for block in config.blocks]
    tail = head_flops(config).total + sum(module_flops(config, block, seq_len).total for block in config.mtp)
    bounds = _even_cut([*costs[:-1], costs[-1] + tail], count)
    return tuple(
        Piece(tuple(range(low, high)), low == 0, high == blocks)
        for low, high in zip([0, *bounds], [*bounds, blocks], strict=True)
    )


def _even_cut(costs: list[float], count: int) -> list[int]:
    """Where to cut so that the largest sum is least: found by halving the bound on it."""
    low, high = max(costs), sum(costs)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_cuts_below(costs, middle)) < count else (middle, high)
    cuts = _cuts_below(costs, high)
    while len(cuts) < count - 1:  # fewer pieces do as well: cut the longest once more
        edges = [0, *cuts, len(costs)]
        widest = max(range(len(edges) - 1), key=lambda i: edges[i + 1] - edges[i])
        cuts = sorted([*cuts, (edges[widest] + edges[widest + 1]) // 2])
    return cuts


def _cuts_below(costs: list[float], bound: float) -> list[int]:
    cuts, total = [], 0.0
    for i, cost in enumerate(costs):
        if total and total + cost > bound * (1 + 1e-12):
            cuts.append(i)
            total = 0.0
        total += cost
    return cuts


def pieces_of_ranks(config: ModelConfig, setup: Setup) -> tuple[tuple[Piece, ...], ...]:
    """What each rank of the pipeline holds, in the order of the ranks.

    Raises:
        ConfigError: fewer blocks than pieces.
    """
    ranks, each = setup.pipeline, chunks_of(setup.schedule, setup.virtual) if setup.pipeline > 1 else 1
    cut = pieces(config, ranks * each, setup.seq_len)
    if ranks == 1:
        return (cut,)
    if setup.schedule == "dualpipe":
        return tuple((cut[rank], cut[ranks - 1 - rank]) for rank in range(ranks))
    if setup.schedule in ("zbv", "dualpipev"):
        return tuple((cut[rank], cut[2 * ranks - 1 - rank]) for rank in range(ranks))
    return tuple(tuple(cut[rank + turn * ranks] for turn in range(each)) for rank in range(ranks))


@dataclass(frozen=True)
class Parameters:
    """Of the pieces of a rank, before anything is sharded."""

    blocks: int = 0
    """All that is in blocks but routed experts."""
    experts: int = 0
    """Routed experts, of all processes."""
    root: int = 0
    """Embedding, head and last norm."""
    largest_block: int = 0
    """Of the block that has most, without routed experts."""
    largest_experts: int = 0
    """Routed experts of one layer."""


def parameters_of(config: ModelConfig, held: tuple[Piece, ...]) -> Parameters:
    """Count what the pieces of one rank hold."""
    hidden = config.hidden_size
    own = [config.blocks[i] for piece in held for i in piece.blocks]
    extra = 0
    if any(piece.last for piece in held):
        own += config.mtp
        extra = len(config.mtp) * (2 * hidden * hidden + 3 * hidden)
    dense, experts = [], []
    for block in own:
        layer = block.feed_forward
        routed = 0
        if isinstance(layer, MoEConfig):
            routed = 3 * hidden * layer.expert_hidden_size * layer.num_routed_experts
        whole = block.attention.num_parameters(hidden) + layer.num_parameters(hidden) + 2 * hidden
        dense.append(whole - routed)
        experts.append(routed)
    first, last = any(piece.first for piece in held), any(piece.last for piece in held)
    # Prediction modules look tokens up: away from the first piece they have a copy of the embedding.
    matrices = int(first or last) if config.tie_embeddings else first + last + (last and not first and bool(config.mtp))
    root = matrices * config.vocab_size * hidden + hidden * last
    return Parameters(sum(dense) + extra, sum(experts), root, max(dense), max(experts))
