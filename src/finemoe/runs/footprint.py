"""How much memory a process of a run takes at its height, from its configuration alone: nothing is allocated.

Weights follow from the number of parameters; gradients and optimizer state from how many of them move. What else a
method or a choice of what may move holds, it says itself: a teacher, what adapters are added to, masks. What a
micro-batch leaves behind for the backward pass is counted layer by layer: every product keeps what went in and what
comes out. Measured on a CPU the sum is right within a factor of `WITHIN` (tests/runs/test_footprint.py); a run is
refused only where it does not fit at all. Not counted: the one number that preferences keep of every answer.

Of several processes each holds pieces, cut as `parallel` cuts them; what it puts together for products, and how many
micro-batches are under way in a pipeline, is what the planner counts (`parallel.planner.memory`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from finemoe.checkpoint.weights.shapes import parameter_shapes
from finemoe.core import memory
from finemoe.core.errors import RunError
from finemoe.methods.setting import Held, Kept, numbers
from finemoe.model.attention.latent import LatentConfig
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.memory import memory_of, under_way
from finemoe.parallel.planner.setup import Piece, Setup
from finemoe.parallel.stages import EMBEDDING, Cut
from finemoe.runs.config import RunConfig

WITHIN = 1.6
"""Factor between estimate and what a process was seen to take, either way; 0.8 to 1.4 in most settings."""

VALIDATION_TOKENS = 16_384  # of one forward pass when the run is measured
_BESIDE = 1.25
"""Times what is kept: what is made and dropped on the way, and what lies unused between tensors."""
_AT_ANY_RATE = 48 << 20
"""Of threads, libraries and buffers that the first step loads."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process at the height of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of one micro-batch, with what the loss needs; in a pipeline, of all that are under way."""
    copy: int
    """Of a checkpoint while it is written. One process waits instead where there is no room for it; of several the
    first puts it together in the memory of its machine."""
    micro_batch_tokens: int
    kept: tuple[Kept, ...] = ()
    """Beside the model, by the method and by what may move."""
    before: int = 0
    """All that is held at the height of what is done before the first step."""
    only_before: tuple[Kept, ...] = ()
    """What is held in that time alone."""
    together: int = 0
    """Of several processes: weights put together for products, gradients before they are summed, rows on their way."""

    @property
    def stepping(self) -> int:
        """At the height of a step, not before."""
        beside = sum(one.nbytes for one in self.kept)
        return self.weights + self.gradients + self.optimizer + self.activations + self.together + beside

    @property
    def needed(self) -> int:
        """All that the run cannot do without."""
        return max(self.stepping, self.before)


@dataclass(frozen=True)
class _Place:
    """A rank of the pipeline, and what it holds: the whole model where there is none."""

    layout: Layout
    setup: Setup
    rank: int
    held: tuple[Piece, ...]
    shares_embedding: bool

    @property
    def is_first(self) -> bool:
        return any(piece.first for piece in self.held)

    @property
    def is_last(self) -> bool:
        return any(piece.last for piece in self.held)

    def blocks(self, model: ModelConfig) -> list[BlockConfig]:
        own = [model.blocks[number] for piece in self.held for number in piece.blocks]
        return [*own, *model.mtp] if self.is_last else own

    def shapes(self, whole: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Of the pieces that lie with the process that has most, by name."""
        numbers = {str(number) for piece in self.held for number in piece.blocks}
        found = {}
        for name, shape in whole.items():
            part, number, *_ = (*name.split("."), "")
            here = number in numbers if part == "blocks" else self.is_last
            here |= name == EMBEDDING and self.is_first
            if here and (name != EMBEDDING or self.is_first or self.shares_embedding):
                found[name] = self._cut(name, shape)
        return found

    def _cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Along the first dimension: experts over those that share them, then everything by FSDP2."""
        over = self.layout.expert * self.layout.expert_shard if ".experts." in name else self.layout.fsdp
        return (-(-shape[0] // over), *shape[1:])


def footprint(config: RunConfig, *, bf16: bool = False, layout: Layout | None = None) -> Footprint:
    """What a process of `config` takes, on a CPU or in bf16 products on an accelerator: the one that takes most.

    Args:
        config: of a run.
        bf16: its precision where it computes.
        layout: of its processes; None: one alone.

    Raises:
        ConfigError, CheckpointError: what is to move does not fit the model, or there is no teacher.
    """
    return _height(config, bf16, layout or Layout(), parameter_shapes(config.model))


def _height(config: RunConfig, bf16: bool, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Footprint:
    """`footprint`; `shapes` of the whole model."""
    places = _places(config, bf16, layout)
    return max((_in_place(config, bf16, one, shapes) for one in places), key=lambda found: found.needed)


def _places(config: RunConfig, bf16: bool, layout: Layout) -> list[_Place]:
    """Each rank of the pipeline: its neighbours in data, shard and context are like it."""
    micro, width = config.micro_batch_sequences, layout.pipeline
    micro = min(micro, config.sequences_per_step // layout.data)
    count = -(-config.sequences_per_step // (layout.data * micro))
    if width > 1:  # the planner's schedules take whole rounds of them; more than two rounds hold no more
        count = -(-max(count, 2 * width) // width) * width
    setup = Setup.of(
        layout,
        sequences=count * layout.data * micro,
        seq_len=config.data.sequence_length,
        micro_batch=micro,
        precision="bf16" if bf16 else "fp32",
        recompute=config.kernels.recompute,
    )
    if width == 1:
        return [_Place(layout, setup, 0, (Piece(tuple(range(len(config.model.blocks))), True, True),), False)]
    cut = Cut.of(config.model, layout.schedule, width)
    return [
        _Place(
            layout,
            setup,
            rank,
            tuple(Piece(tuple(range(one.first, one.stop)), one.is_first, one.is_last) for one in cut.held_by(rank)),
            cut.shares_embedding,
        )
        for rank in range(width)
    ]


def _in_place(config: RunConfig, bf16: bool, place: _Place, whole: Mapping[str, tuple[int, ...]]) -> Footprint:
    model, state = config.model, config.optimizer.state_bytes
    shapes, tokens = place.shapes(whole), place.setup.tokens
    moving = {name: shape for name, shape in shapes.items() if config.method.moves(name)}
    held: Held = config.trainable.held(moving, config.setting)
    kept = (*config.method.kept(4 * numbers(shapes)), *held.kept)
    activations = _activations(config, tokens, bf16, place)
    weights = 4 * numbers(shapes)
    first = weights + sum(one.nbytes for one in (*kept, *held.before))
    length = config.data.sequence_length
    first += _activations(config, held.sequences_before * length, bf16, place) if held.before else 0
    alone = sum(one.nbytes for one in config.method.before)
    only_before = held.before if first >= alone and held.before else config.method.before
    before = max(first if held.before else 0, alone + _AT_ANY_RATE if alone else 0)
    if place.layout.processes > 1 and config.method.prepares:
        uncut = Kept("the whole model", 4 * numbers(whole), "fewer layers or experts")
        before = max(before, uncut.nbytes + sum(one.nbytes for one in kept) + _AT_ANY_RATE)
        only_before = (*only_before, uncut)
    together = 0
    if place.layout.processes > 1:
        counted = memory_of(model, place.setup, place.rank, place.held)
        together = counted.gathered + counted.whole_gradients + counted.exchange
    return Footprint(
        weights=weights,
        gradients=4 * (held.stepped + held.passing),
        optimizer=state * held.stepped,
        activations=activations,
        copy=_checkpoint(config, whole, state, place.layout),
        micro_batch_tokens=tokens,
        kept=kept,
        before=before,
        only_before=only_before,
        together=together,
    )


def _checkpoint(config: RunConfig, whole: Mapping[str, tuple[int, ...]], state: int, layout: Layout) -> int:
    """[bytes] Of one, which is of the whole model; nobody puts one in pieces together."""
    if layout.processes > 1 and config.training.checkpoint_format == "sharded":
        return 0
    moving = {name: shape for name, shape in whole.items() if config.method.moves(name)}
    return 4 * numbers(whole) + state * config.trainable.held(moving, config.setting).stepped


def _activations(config: RunConfig, tokens: int, bf16: bool, place: _Place) -> int:
    """[bytes] What so many tokens leave behind at once, or those of a validation, with what the loss needs."""
    model = config.model
    kept = [_kept_by_block(block, config, bf16) for block in place.blocks(model)]
    streams = 2 * model.hidden_size * len(kept)  # the residual stream, before attention and before the feed-forward
    # While a block is taken back its gradients are made; a block that is recomputed is there once more for that.
    each, at_work = (streams, 3 * max(kept)) if config.kernels.recompute else (streams + sum(kept), max(kept))
    head = 2 * 4 * model.vocab_size * model.hidden_size  # the loss makes the head's gradient beside its place
    nbytes = _BESIDE * (2 if bf16 else 4)
    training = int(tokens * (each * under_way(place.setup, place.rank) + at_work) * nbytes)
    measured_on = min(VALIDATION_TOKENS, config.data.max_validation_tokens)
    validating = int(measured_on * (2 * model.hidden_size + max(kept) / 2) * nbytes)  # half of it at a time
    return max(training, validating) + head * place.is_last + _AT_ANY_RATE


def _kept_by_block(block: BlockConfig, config: RunConfig, bf16: bool) -> int:
    """Numbers a token leaves in a block until its backward pass."""
    hidden, attention, layer = config.model.hidden_size, block.attention, block.feed_forward
    heads = attention.num_heads
    if isinstance(attention, LatentConfig):
        queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
        ranks = 2 * ((attention.q_lora_rank or 0) + attention.kv_lora_rank)
        attending = 4 * queries + 2 * values + ranks
    else:
        attending = 2 * attention.head_dim * (heads + attention.num_kv_heads) + attention.head_dim * heads
        if bf16 or config.kernels.products == "torch":  # a key for every head
            attending += 2 * attention.head_dim * heads
    if config.kernels.attention == "reference":
        attending += 3 * heads * config.data.sequence_length
    native = not bf16 and config.kernels.products != "torch"
    if not isinstance(layer, MoEConfig):
        return 2 * hidden + attending + (2 if native else 4) * int(layer.ffn_hidden_size)
    k, width = layer.experts_per_token, layer.expert_hidden_size
    in_place = not bf16 and config.kernels.experts in ("auto", "native")  # reads states where they lie, keeps little
    routed = k * (2 * width if in_place else 3 * width + 2 * hidden) + 3 * layer.num_routed_experts
    shared = (2 if native else 4) * width * layer.num_shared_experts + (hidden if layer.num_shared_experts else 0)
    return 2 * hidden + attending + routed + shared


def require_memory(
    config: RunConfig,
    device: torch.device,
    *,
    bf16: bool,
    at_once: int = 1,
    layout: Layout | None = None,
    here: int = 1,
    others: Iterable[Layout] = (),
) -> None:
    """Refuse what cannot fit, before it starts.

    Args:
        config: of a run; `training.memory_check` false lets everything through.
        device: where it computes.
        bf16: its precision there.
        at_once: how many such runs go at the same time.
        layout: of its processes; None: one alone.
        here: how many of them are on this machine: on a CPU they share its memory, and each has a GPU of its own.
        others: layouts to try where `layout` does not fit, the nearest first; the first that does is named.

    Raises:
        RunError: names what it needs, what there is, and what to lower.
        ConfigError, CheckpointError: as `footprint`.
    """
    available = memory.available_on(device)
    if available is None or not config.training.memory_check:
        return
    layout, shapes = layout or Layout(), parameter_shapes(config.model)

    def taken(layout: Layout) -> tuple[Footprint, int]:
        found = _height(config, bf16, layout, shapes)
        return found, _on_machine(found, device, layout, at_once, here)

    found, needed = taken(layout)
    if needed <= available:
        _require_room(found, device, layout)
        return
    fitting = next((one for one in others if taken(one)[1] <= available), None)
    times = at_once if layout.processes == 1 or device.type == "cuda" else at_once * here
    activations = needed - available < times * found.activations
    raise RunError(
        f"{_who(layout, device, at_once, here)} about {needed / 2**30:.2f} GiB of memory, and "
        f"{available / 2**30:.2f} GiB are available: {_parts(found, at_once if layout.processes == 1 else 1)}"
        f"{_of_machine(found, device, layout, here)}. {_advice(config, found, at_once, activations, fitting)}, "
        "or go on regardless with --set training.memory_check=false"
    )


def _require_room(found: Footprint, device: torch.device, layout: Layout) -> None:
    """Refuse a checkpoint that rank 0 could not put together in its machine's memory, where the model is on GPUs."""
    available = memory.available_bytes()
    if device.type != "cuda" or layout.processes == 1 or available is None or found.copy <= available:
        return
    raise RunError(
        f"rank 0 puts each checkpoint together in its machine's memory, {found.copy / 2**30:.2f} GiB, and "
        f"{available / 2**30:.2f} GiB are available there. Try --set training.checkpoint_format=sharded, or a machine "
        "with more memory, or go on regardless with --set training.memory_check=false"
    )


def _on_machine(found: Footprint, device: torch.device, layout: Layout, at_once: int, here: int) -> int:
    """[bytes] Of the memory that is asked for: this process's, or on a CPU that of all that share it.

    Rank 0 puts each checkpoint together there, before it goes on.
    """
    if device.type == "cuda" or layout.processes == 1:
        return at_once * found.needed
    return at_once * (here * found.needed + found.copy)


def _who(layout: Layout, device: torch.device, at_once: int, here: int) -> str:
    if at_once > 1:
        return f"{at_once} runs at the same time need"
    if layout.processes == 1:
        return "this run needs"
    if device.type == "cuda" or here == 1:
        return f"each of {layout.processes} processes ({layout}) needs"
    of = "" if here == layout.processes else f" of {layout.processes}"
    return f"the {here}{of} processes on this machine ({layout}) need"


def _of_machine(found: Footprint, device: torch.device, layout: Layout, here: int) -> str:
    """How the parts of one process come to the sum."""
    if device.type == "cuda" or layout.processes == 1:
        return ""
    together = f", and {found.copy / 2**30:.2f} where rank 0 puts a checkpoint together" if found.copy else ""
    return f"; {here} times that{together}"


def _parts(found: Footprint, times: int) -> str:
    """What it is taken for, in GiB."""
    if found.before > found.stepping:
        only = ", ".join(f"{one.what} {times * one.nbytes / 2**30:.2f}" for one in found.only_before)
        return f"before its first step, with {only}"
    parts = (found.weights, found.gradients, found.optimizer, found.activations)
    weights, gradients, optimizer, activations = (f"{times * part / 2**30:.2f}" for part in parts)
    beside = "".join(f", {one.what} {times * one.nbytes / 2**30:.2f}" for one in found.kept)
    together = f", what is put together for products {found.together / 2**30:.2f}" if found.together else ""
    return (
        f"weights {weights}, gradients {gradients}, optimizer {optimizer}{together}{beside}, activations of a "
        f"micro-batch of {found.micro_batch_tokens:,} tokens {activations}"
    )


def _advice(config: RunConfig, found: Footprint, at_once: int, activations: bool, fitting: Layout | None) -> str:
    """What to lower: activations where it would fit without them; and a layout that fits."""
    advice = ["a smaller model"]
    if found.before > found.stepping:
        advice = [one.lower for one in found.only_before]
    elif activations:
        least = config.data.sequence_length
        lower = max(least, found.micro_batch_tokens // 4 // least * least)
        advice = [f"training.micro_batch_tokens={lower}"] if lower < found.micro_batch_tokens else []
        if not config.kernels.recompute:
            advice.append("kernels.recompute=true")
        advice.append("a shorter data.sequence_length or a smaller model")
    if found.before <= found.stepping:
        advice += [one.lower for one in found.kept if one.nbytes > found.needed / 20]
        advice += ["optimizer.moments=bf16"] * (config.optimizer.may_be_smaller and found.optimizer > found.needed / 10)
    if fitting is not None:
        advice.insert(0, in_keys(fitting) + f" with {fitting.processes} processes, which fits")
    if at_once > 1:
        advice.insert(0, "fewer parallel_runs")
    return f"Try {', '.join(advice)}"


def in_keys(layout: Layout) -> str:
    """A layout as settings of `[parallel]`."""
    sizes = {name: getattr(layout, name) for name in ("pipeline", "replicate", "shard", "context", "expert")}
    return " ".join(f"--set parallel.{name}={size}" for name, size in sizes.items() if size > 1 or name == "shard")
