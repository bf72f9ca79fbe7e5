"""How long a step takes: ten constants between what a device could do and what runs reach.

Eight say how far from its peaks a device stays (products by precision, routed experts, attention, passes over what is
kept, what products read and write, collectives that computing does not hide), one how long a layer with experts keeps
the host, one what plain PyTorch costs beside tuned kernels. They are fitted on `published.FITTED` (`calibration.fit`,
which the tests run again), and judged on the rest. Everything else is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.planner.bubbles import chunks_of, waits
from finemoe.parallel.planner.devices import Device
from finemoe.parallel.planner.flops import Flops, block_flops, head_flops, module_flops, products_of
from finemoe.parallel.planner.setup import Piece, Setup, parameters_of, pieces_of_ranks
from finemoe.parallel.planner.timeline import Costs
from finemoe.parallel.planner.traffic import SHARED_PRODUCTS, Collective, collectives, moe_layers, over_network

HIDDEN_BY_DUAL = 0.96
"""Of communication, by computing, in DeepSeek's published profile of DualPipe (profile-data, train.json)."""
_STATE_TRAFFIC = 12  # bytes a parameter that an update reads and writes: weight and gradient in, weight out


@dataclass(frozen=True)
class Constants:
    """What is fitted."""

    bf16: float
    """Of the peak, that large products in bf16 reach."""
    fp8: float
    """The same in FP8, with making the numbers small."""
    experts: float
    """Of that, that products of routed experts reach."""
    scores: float
    """Of the bf16 peak, that attention reaches."""
    passes: float
    """How often what a token leaves for its backward goes through memory."""
    operands: float
    """How often what products read and write goes through memory for them, where once is the least: small products pay
    for it, in narrow experts and narrow models, and large ones hardly."""
    casts: float
    """How often more, in FP8, that of routed copies does: it is made small expert by expert, in rows and in columns."""
    exposed: float
    """Of the time of collectives, that computing does not hide."""
    host: float
    """[s] That a layer with routed experts keeps the host, each micro-batch."""
    torch: float
    """How many times as long computing takes with PyTorch's kernels as with those made for the device."""

    def with_torch(self) -> Constants:
        """Those of a run with PyTorch's kernels."""
        slower = {name: getattr(self, name) / self.torch for name in ("bf16", "fp8", "scores")}
        longer = {name: getattr(self, name) * self.torch for name in ("passes", "operands", "casts", "host")}
        return replace(self, **slower, **longer, torch=1.0)


@dataclass(frozen=True)
class StepTime:
    """[s] Of one step, on the rank that works longest, by what they are spent on."""

    products: float
    experts: float
    scores: float
    memory: float
    host: float
    exchange: float
    """Collectives that are not hidden: rows of experts, shared products, sequences, gathered weights, stages."""
    bubble: float
    update: float
    """Summing gradients once a step, gathering once a step, the optimizer."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, float]:
        """JSON-able."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _Busy:
    """[s] Of one micro-batch on one rank, forward and back."""

    products: float
    experts: float
    scores: float
    memory: float
    host: float
    exchange: float

    @property
    def total(self) -> float:
        return self.products + self.experts + self.scores + self.memory + self.host + self.exchange


def step_time(
    config: ModelConfig, setup: Setup, device: Device, constants: Constants, max_vio: float = 0.0
) -> StepTime:
    """The time of a step, with kernels made for the device; `with_torch` gives constants for PyTorch's.

    Args:
        config, setup, device: what runs how on what.
        constants: as fitted.
        max_vio: of the rows that a process's experts receive; the others wait for the process that receives most.

    Raises:
        ConfigError: a precision that the device has no products of, or a pipeline of more pieces than blocks.
    """
    ranks = pieces_of_ranks(config, setup)
    busy = [_busy(config, setup, device, constants, held, max_vio) for held in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: busy[rank].total)
    worst, many, full = busy[slowest], setup.micro_batches, setup.full_micro_batches
    waiting = waits(setup.schedule, setup.pipeline, _chunk(worst, setup)) if setup.pipeline > 1 else 0.0
    return StepTime(
        products=full * worst.products,
        experts=full * worst.experts,
        scores=full * worst.scores,
        memory=full * worst.memory,
        host=many * worst.host,
        exchange=many * worst.exchange,
        bubble=waiting,
        update=max(_update(config, setup, device, constants, held) for held in ranks),
    )


def costs(config: ModelConfig, setup: Setup, device: Device, constants: Constants) -> Costs:
    """Durations of one chunk on the rank that works longest, for the time line of a step."""
    ranks = pieces_of_ranks(config, setup)
    worst = max((_busy(config, setup, device, constants, held, 0.0) for held in ranks), key=lambda busy: busy.total)
    return _chunk(worst, setup)


def _chunk(busy: _Busy, setup: Setup) -> Costs:
    """A third forward, two thirds back; of those a third of the products is for the weights. More where recomputed."""
    chunks = (chunks_of(setup.schedule, setup.virtual) if setup.pipeline > 1 else 1) or 1
    parts = 4 if setup.recompute else 3
    forward = busy.total / parts / chunks
    weights = (busy.products + busy.experts) / parts / chunks
    return Costs(forward, busy.total / chunks - forward, weights)


def _own(config: ModelConfig, held: Sequence[Piece]) -> list[BlockConfig]:
    own = [config.blocks[i] for piece in held for i in piece.blocks]
    return own + list(config.mtp) * any(piece.last for piece in held)


def flops_of(config: ModelConfig, seq_len: int, held: Sequence[Piece]) -> Flops:
    """Of one token, forward and back, in the pieces of a rank."""
    total = Flops()
    for piece in held:
        for i in piece.blocks:
            total += block_flops(config.blocks[i], config.hidden_size, seq_len)
        if piece.last:
            total += head_flops(config)
            for block in config.mtp:
                total += module_flops(config, block, seq_len)
    return total


def _busy(
    config: ModelConfig, setup: Setup, device: Device, constants: Constants, held: tuple[Piece, ...], max_vio: float
) -> _Busy:
    flops = flops_of(config, setup.seq_len, held)
    tokens = setup.tokens / setup.tensor
    again = 4 / 3 if setup.recompute else 1.0
    low = "fp32" if setup.precision == "fp32" else "bf16"  # attention and head stay in it (V3 section 3.3.1)
    plain = constants.bf16 * device.flops(low)  # type: ignore[arg-type]
    fast = constants.fp8 * device.flops("fp8") if setup.precision == "fp8" else plain
    products = tokens * (again * flops.products / fast + flops.head / plain)
    experts = tokens * again * flops.experts / (fast * constants.experts) * (1 + max_vio)
    scores = tokens * again * flops.scores / (constants.scores * device.flops(low))  # type: ignore[arg-type]
    kept = sum(_passing(block, config.hidden_size) for block in _own(config, held))
    copied = sum(_copied(block, config.hidden_size) for block in _own(config, held))
    passed = constants.passes * kept + (constants.casts * copied if setup.precision == "fp8" else 0.0)
    moved = constants.operands * again * _operands(config, setup, held)
    memory = (tokens * passed + moved) * setup.width / device.bandwidth
    computing = products + experts + scores + memory
    # Two pieces of a DualPipe are worked on by half of the micro-batches each.
    half = 0.5 if setup.schedule == "dualpipe" and setup.pipeline > 1 else 1.0
    host = 0.0 if setup.graphs else constants.host * len(moe_layers(config, held))
    found = collectives(config, setup, held)
    exchange = _exchanged(config, setup, device, constants, held, found, computing)
    return _Busy(half * products, half * experts, half * scores, half * memory, half * host, exchange)


def _passing(block: BlockConfig, hidden: int) -> int:
    """Numbers of a token that pass through memory in a block: what goes into and comes out of each operation.

    Two residual states and two norms of them; queries, keys and values as attention takes them, and its output; gate,
    up, their activation and their product; of routed experts these for each copy, with its row in and out. How often
    each passes is a fitted constant, so this is a measure and no account; that is `memory.kept_bytes`.
    """
    attention, layer = block.attention, block.feed_forward
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        latents = 2 * ((attention.q_lora_rank or 0) + attention.kv_lora_rank)
        attending = heads * (3 * attention.qk_head_dim + 2 * attention.v_head_dim) + latents
    else:
        attending = attention.head_dim * (2 * heads + 2 * attention.num_kv_heads)
        if attention.qk_norm != "none":
            attending += attention.head_dim * (heads + attention.num_kv_heads)
    if not isinstance(layer, MoEConfig):
        return int(4 * hidden + attending + 4 * layer.ffn_hidden_size)
    shared = 4 * layer.expert_hidden_size * layer.num_shared_experts + hidden * bool(layer.num_shared_experts)
    return int(4 * hidden + attending + _copied(block, hidden) + shared + 3 * layer.num_routed_experts)


def _copied(block: BlockConfig, hidden: int) -> int:
    """Those of them of a token's copies for routed experts."""
    layer = block.feed_forward
    if not isinstance(layer, MoEConfig):
        return 0
    return int(layer.experts_per_token * (4 * layer.expert_hidden_size + 2 * hidden))


def _operands(config: ModelConfig, setup: Setup, held: Sequence[Piece]) -> float:
    """Numbers that the products of a micro-batch read and write, if each goes through memory once.

    Forward, and twice back, each with rows in, rows out and a weight; the weights of all experts that lie here are
    among them, however few rows each gets.
    """
    hidden = config.hidden_size
    rows = weights = 0.0
    for block in _own(config, held):
        for width, out in products_of(block, hidden):
            rows += width + out
            weights += width * out
        layer = block.feed_forward
        if isinstance(layer, MoEConfig):
            rows += layer.experts_per_token * (2 * hidden + 3 * layer.expert_hidden_size)
            weights += 3 * hidden * layer.expert_hidden_size * layer.num_routed_experts * setup.tensor / setup.expert
    if any(piece.last for piece in held):
        joined = len(config.mtp)
        rows += (1 + joined) * (hidden + config.vocab_size) + 3 * hidden * joined
        weights += (1 + joined) * hidden * config.vocab_size + 2 * hidden * hidden * joined
    return 3 * (setup.tokens * rows + weights) / setup.tensor


def _exchanged(
    config: ModelConfig,
    setup: Setup,
    device: Device,
    constants: Constants,
    held: tuple[Piece, ...],
    found: list[Collective],
    computing: float,
) -> float:
    """[s] Of a micro-batch's collectives, that computing does not hide."""
    many = setup.micro_batches
    exposed = constants.exposed
    if setup.schedule in ("dualpipe", "dualpipev") and setup.pipeline > 1 and setup.once_a_node:
        exposed = 1 - HIDDEN_BY_DUAL  # by kernels of its own; PyTorch's DualPipeV runs the two one after the other
    raw = gathering = 0.0
    layers = moe_layers(config, held)
    half = 0.5 if setup.schedule == "dualpipe" and setup.pipeline > 1 else 1.0
    for one in found:
        if one.times < many / 2 or one.name.startswith("sum gradients over"):
            continue  # once a step
        each = one.times / many * one.size
        if one.name.startswith(("dispatch", "combine")):
            across = sum(over_network(layer, setup, device.domain) for layer in layers) / len(layers)
            raw += half * each * max(across / device.network, max(0.0, 1 - across) / device.link)
        elif one.name.startswith(("gather weights", "gather embedding", "sum gradients")) and "keys" not in one.name:
            gathering += each / device.between(one.spread or one.group)
        elif one.name != SHARED_PRODUCTS:  # those go beside the products that they are of (Megatron's tp_comm_overlap)
            raw += half * each / device.between(one.spread or one.group)
    return exposed * raw + max(exposed * gathering, gathering - computing)


def _update(config: ModelConfig, setup: Setup, device: Device, constants: Constants, held: tuple[Piece, ...]) -> float:
    """[s] At the end of a step."""
    parameters = parameters_of(config, held)
    spread = setup.fsdp * setup.tensor
    mine = (parameters.blocks + parameters.root) / spread + parameters.experts / (setup.expert * setup.expert_shard)
    raw = sum(
        one.total / device.between(one.spread or one.group)
        for one in collectives(config, setup, held)
        if one.times == 1 and ("gather" in one.name or "sum" in one.name)
    )
    return (_STATE_TRAFFIC + 2 * setup.state_bytes) * mine / device.bandwidth + constants.exposed * raw
