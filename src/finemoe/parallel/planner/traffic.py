"""Bytes that each collective of a step moves into a rank, from the layout alone.

FSDP2: every weight of a block is gathered for the forward and again for the backward of a micro-batch; the root's
(embedding, head) once, since it stays until its backward; gradients are summed and scattered once a micro-batch.
Experts are gathered over the processes that share one's, no others, in the precision of products; of the rest autocast
makes that where it lies, and float32 travels, as it does between stages (`Setup.narrow`). What a ring of n moves into
each of its members is (n-1)/n of the whole; an all-reduce moves it twice.

Expert parallelism: a token's state travels to each of its experts that lies elsewhere, and what they made of it back;
the backward does both again in the other direction. Evenly routed, (n-1)/n of the copies leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finemoe.model.attention.grouped_query import GroupedQueryConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.parallel.planner.setup import Parameters, Piece, Setup, parameters_of

SHARED_PRODUCTS = "states of shared products"


@dataclass(frozen=True)
class Collective:
    """One kind of exchange of a rank."""

    name: str
    group: int
    """[processes] That take part."""
    times: float
    """A step."""
    size: float
    """[bytes] That reach the rank each time."""
    spread: int = 0
    """[processes] Over which neighbours' numbers reach, for the link that limits it; 0: as `group`."""

    @property
    def total(self) -> float:
        """[bytes] A step."""
        return self.times * self.size

    def to_dict(self) -> dict[str, float | str]:
        """JSON-able."""
        return {"name": self.name, "group": self.group, "times": self.times, "bytes": self.size, "total": self.total}


def collectives(config: ModelConfig, setup: Setup, held: tuple[Piece, ...]) -> list[Collective]:
    """All that a rank of the pipeline with the pieces `held` takes part in, a step."""
    parameters = parameters_of(config, held)
    found = [
        *_gathers(setup, parameters),
        *_sums(setup, parameters),
        *_experts(config, setup, held),
        *_sends(config, setup, held),
        *_contexts(config, setup, held),
        *_products(config, setup, held),
    ]
    return [one for one in found if one.times and one.size]


def _share(processes: int) -> float:
    return (processes - 1) / processes


def _gathers(setup: Setup, parameters: Parameters) -> list[Collective]:
    once = 1 if setup.gather == "step" else setup.micro_batches
    again = 1 if setup.gather == "step" else 2
    n, m = setup.fsdp, setup.expert_shard
    blocks, root = (
        setup.stream_width * part / setup.tensor * _share(n) for part in (parameters.blocks, parameters.root)
    )
    experts = setup.width * parameters.experts / setup.expert * _share(m)
    return [
        Collective("gather weights of blocks", n, again * once, blocks),
        Collective("gather embedding and head", n, once, root),
        Collective("gather weights of experts", m, again * once, experts, m * setup.expert),
    ]


def _sums(setup: Setup, parameters: Parameters) -> list[Collective]:
    once = 1 if setup.reduce == "step" else setup.micro_batches
    n, m, r = setup.fsdp, setup.expert_shard, setup.replicate
    shared = (parameters.blocks + parameters.root) / setup.tensor
    experts = parameters.experts / setup.expert
    beyond = 2 * _share(r) * 4
    return [
        Collective("sum gradients", n, once, 4 * shared * _share(n)),
        Collective("sum gradients of experts", m, once, 4 * experts * _share(m), m * setup.expert),
        Collective("sum gradients over copies", r, once, beyond * (shared / n + experts / m), r * n),
    ]


def moe_layers(config: ModelConfig, held: tuple[Piece, ...]) -> list[MoEConfig]:
    """Layers of the pieces that route, prediction modules' among them."""
    own: list[BlockConfig] = [config.blocks[i] for piece in held for i in piece.blocks]
    if any(piece.last for piece in held):
        own += config.mtp
    return [block.feed_forward for block in own if isinstance(block.feed_forward, MoEConfig)]


def _experts(config: ModelConfig, setup: Setup, held: tuple[Piece, ...]) -> list[Collective]:
    layers, ep = moe_layers(config, held), setup.expert
    if ep == 1 or not layers:
        return []
    copies = sum(layer.experts_per_token for layer in layers)
    rows = setup.tokens / setup.tensor * copies * _share(ep)
    # Products in FP8 take their rows in FP8, a byte a number (V3 section 3.2.2); what comes back is in 16 bits.
    there, back = {"fp32": (4, 4), "bf16": (2, 2), "fp8": (1, 2)}[setup.precision]
    sizes = {"dispatch": there, "combine": back, "combine, backward": back, "dispatch, backward": back}
    forward = 1 + setup.recompute
    times = {"dispatch": forward, "combine": forward, "combine, backward": 1, "dispatch, backward": 1}
    # How many rows will come is told first: a number of 64 bits for each expert that lies elsewhere.
    told = 8 * sum(layer.num_routed_experts for layer in layers) * _share(ep)
    return [
        Collective("counts of rows", ep, forward * setup.micro_batches, told),
        *(
            Collective(name, ep, times[name] * setup.full_micro_batches, rows * config.hidden_size * width)
            for name, width in sizes.items()
        ),
    ]


def over_network(layer: MoEConfig, setup: Setup, domain: int) -> float:
    """Rows that cross the network for each copy that leaves a process.

    Copies spread over nodes of `domain` devices. Where a row crosses to a node once and is passed on there (V3 section
    3.2.2), a token needs as many as nodes that it reaches, which a group-limited router bounds.
    """
    nodes, k = -(-setup.expert // domain), layer.experts_per_token
    if nodes == 1:
        return 0.0
    leaving = k * _share(setup.expert)
    if not setup.once_a_node:
        return k * _share(nodes) / leaving
    reached = nodes * (1 - (1 - 1 / nodes) ** k)
    router = layer.router
    if isinstance(router, GroupsConfig) and router.num_groups == nodes:
        reached = min(reached, float(router.groups_per_token))
    return reached * _share(nodes) / leaving


def _sends(config: ModelConfig, setup: Setup, held: tuple[Piece, ...]) -> list[Collective]:
    if setup.pipeline == 1:
        return []
    size = setup.tokens / setup.tensor * config.hidden_size * setup.stream_width
    each = setup.full_micro_batches / (2 if setup.schedule == "dualpipe" else 1)  # half of them from each end
    forward = sum(not piece.first for piece in held) - _turns(setup, held)
    back = sum(not piece.last for piece in held) - _turns(setup, held)
    return [
        Collective("states from the stage before", 2, forward * each, size, setup.processes),
        Collective("gradients from the stage after", 2, back * each, size, setup.processes),
    ]


def _turns(setup: Setup, held: tuple[Piece, ...]) -> int:
    """Whether a V turns on this rank: its two chunks follow one another, and nothing travels between them."""
    if setup.schedule not in ("zbv", "dualpipev"):
        return 0
    first, second = held
    return int(bool(first.blocks) and bool(second.blocks) and first.blocks[-1] + 1 == second.blocks[0])


def _contexts(config: ModelConfig, setup: Setup, held: tuple[Piece, ...]) -> list[Collective]:
    """Latents, or keys and values, of the other processes' tokens; their gradients are summed, in float32."""
    if setup.context == 1:
        return []
    own: Sequence[BlockConfig] = [config.blocks[i] for piece in held for i in piece.blocks]
    if any(piece.last for piece in held):
        own = [*own, *config.mtp]
    numbers = sum(block.attention.cache_elements_per_token() for block in own)
    split = setup.tensor if all(isinstance(block.attention, GroupedQueryConfig) for block in own) else 1
    sent = setup.tokens * numbers * (setup.context - 1) / split
    forward = (1 + setup.recompute) * setup.full_micro_batches
    return [
        Collective("gather keys of the sequence", setup.context, forward, sent * setup.width),
        Collective("sum gradients of keys", setup.context, setup.full_micro_batches, sent * 4),
    ]


def _products(config: ModelConfig, setup: Setup, held: tuple[Piece, ...]) -> list[Collective]:
    """Of products that processes share: states gathered and summed around attention and around the feed-forward."""
    if setup.tensor == 1:
        return []
    layers = sum(len(piece.blocks) for piece in held) + len(config.mtp) * any(piece.last for piece in held)
    size = layers * setup.tokens * config.hidden_size * setup.width * _share(setup.tensor)
    return [Collective(SHARED_PRODUCTS, setup.tensor, (8 + 4 * setup.recompute) * setup.full_micro_batches, size)]


def rows_leaving(counts: Sequence[Sequence[int]], expert: int) -> list[int]:
    """How many copies of its tokens each process sends to others.

    Args:
        counts: [processes][experts] copies that each process's tokens have of each expert.
        expert: [processes] over which experts are spread in order, each an equal number; `counts` may hold several
            such groups, one after the other.
    """
    leaving = []
    for process, row in enumerate(counts):
        each = len(row) // expert
        home = process % expert
        leaving.append(sum(row) - sum(row[home * each : (home + 1) * each]))
    return leaving


def rows_received(counts: Sequence[Sequence[int]], expert: int) -> list[int]:
    """How many rows reach each process's experts, its own tokens' among them; arguments as of `rows_leaving`."""
    received = [0] * len(counts)
    for process, row in enumerate(counts):
        each = len(row) // expert
        group = process // expert * expert
        for other in range(expert):
            received[group + other] += sum(row[other * each : (other + 1) * each])
    return received
