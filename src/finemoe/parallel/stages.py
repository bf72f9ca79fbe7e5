"""Where a pipeline cuts a model, which rank holds which stages, and what cannot be cut like that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from finemoe.core.errors import ConfigError
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout, Schedule

V_SHAPED = ("zbv", "dualpipev")
"""Schedules that put the first and the last stage on one rank, and weight gradients behind the others."""

EMBEDDING = "embedding.weight"


def stages_per_rank(schedule: Schedule) -> int:
    """How many stages a rank holds."""
    return 1 if schedule == "1f1b" else 2


@dataclass(frozen=True)
class Stage:
    """A piece of the model: blocks `first` up to, and without, `stop`."""

    index: int
    first: int
    stop: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        """It has the embedding."""
        return self.index == 0


@dataclass(frozen=True)
class Cut:
    """A model in stages, and the ranks of a pipeline that hold them."""

    schedule: Schedule
    processes: int
    stages: tuple[Stage, ...]
    shares_embedding: bool
    """The last stage reads the embedding too: it is the head, or the prediction modules look tokens up."""

    @staticmethod
    def of(config: ModelConfig, schedule: Schedule, processes: int) -> Cut:
        """Stages as even as whole blocks allow.

        Raises:
            ConfigError: there are fewer blocks than stages.
        """
        count = processes * stages_per_rank(schedule)
        if len(config.blocks) < count:
            raise ConfigError(_too_few_blocks(schedule, processes, len(config.blocks)))
        ends = _even_ends(_costs(config), count)
        firsts = (0, *ends[:-1])
        stages = [
            Stage(i, first, stop, i == count - 1) for i, (first, stop) in enumerate(zip(firsts, ends, strict=True))
        ]
        return Cut(schedule, processes, tuple(stages), config.tie_embeddings or bool(config.mtp))

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that holds a stage; V-shaped schedules go through the ranks and back."""
        around, rank = divmod(stage, self.processes)
        return self.processes - 1 - rank if around and self.schedule in V_SHAPED else rank

    def held_by(self, rank: int) -> tuple[Stage, ...]:
        """The stages of a rank of the pipeline, in the order of the model."""
        return tuple(stage for stage in self.stages if self.rank_of(stage.index) == rank)

    @property
    def last_rank(self) -> int:
        """The rank that has the loss."""
        return self.rank_of(len(self.stages) - 1)

    @property
    def doubled(self) -> frozenset[str]:
        """Parameters that the first and the last stage have a copy of each, on different ranks."""
        return frozenset({EMBEDDING} if self.shares_embedding and self.last_rank else ())


class Elsewhere(nn.Module):
    """Stands for a part of the model that another rank holds: no weights, and nothing to run."""

    feed_forward = None  # `Transformer.moe_layers` asks every block for its own

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    @property
    def weight(self) -> Any:
        """There is none here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.part} lies on another rank of the pipeline: run the model through all its stages")

    def forward(self, *inputs: Any) -> Any:
        """Raises ConfigError."""
        return self.weight


def keep_only(model: Transformer, cut: Cut, rank: int) -> None:
    """Take out of `model`, which may be on the meta device, what other ranks of the pipeline hold.

    Names stay as in the whole model, so that checkpoints and exports do not change.
    """
    held = cut.held_by(rank)
    mine = {number for stage in held for number in range(stage.first, stage.stop)}
    for number in range(len(model.blocks)):
        if number not in mine:
            model.blocks[number] = Elsewhere(f"blocks.{number}")
    is_first, is_last = any(stage.is_first for stage in held), any(stage.is_last for stage in held)
    whole: Any = model
    if not is_first and not (is_last and cut.shares_embedding):
        whole.embedding = Elsewhere("embedding")
    if not is_last:
        whole.norm = Elsewhere("norm")
        whole.mtp = nn.ModuleList()
        if model.head is not None:
            whole.head = Elsewhere("head")


def modules_of(model: Transformer, stage: Stage, shares_embedding: bool) -> list[nn.Module]:
    """What a stage computes with."""
    found: list[nn.Module] = list(model.blocks[stage.first : stage.stop])
    if stage.is_first or (stage.is_last and shares_embedding):
        found.append(model.embedding)
    if stage.is_last:
        found += [model.norm, model.mtp, *([] if model.head is None else [model.head])]
    return found


def refusals(layout: Layout, config: ModelConfig, micro_batches: int, more: str = "more of them") -> None:
    """Say before anything is built what a pipeline cannot do.

    Args:
        layout: of the run.
        config: of the model.
        micro_batches: of one rank in one step.
        more: how there come to be as many as stages.

    Raises:
        ConfigError: with the field, its value and what to do.
    """
    if layout.pipeline == 1:
        return
    schedule, count = layout.schedule, layout.pipeline * stages_per_rank(layout.schedule)
    named = f'parallel.pipeline {layout.pipeline} with schedule = "{schedule}"'
    if len(config.blocks) < count:
        raise ConfigError(_too_few_blocks(schedule, layout.pipeline, len(config.blocks), layout.processes))
    if schedule in V_SHAPED and config.tie_embeddings and config.mtp:
        raise ConfigError(
            f'parallel.schedule = "{schedule}" cannot train tie_embeddings with {len(config.mtp)} multi-token '
            "prediction modules: the first and the last stage lie on one rank, share the embedding three ways, and "
            'torch goes through its graph twice. Take schedule = "1f1b" or "interleaved", or untie the embeddings'
        )
    if schedule in V_SHAPED and layout.fsdp > 1:
        raise ConfigError(
            f'parallel.schedule = "{schedule}" with shard x context = {layout.fsdp}: it computes gradients of weights '
            "behind the others, past the hooks by which shards are gathered and added up. Take schedule = "
            '"1f1b" or "interleaved", or replicate instead of shard'
        )
    if schedule in ("1f1b", "dualpipev") and micro_batches < count:
        raise ConfigError(
            f"{named} has {count} stages, and a step has {micro_batches} "
            f"micro-batch{'es' * (micro_batches != 1)} for each rank: it takes "
            f"at least as many as stages. Try {more}, or a lower parallel.pipeline"
        )
    rounds = max(1, micro_batches // layout.pipeline)
    if schedule == "interleaved" and micro_batches % rounds:
        near = micro_batches - micro_batches % layout.pipeline
        raise ConfigError(
            f"{named} takes micro-batches in {rounds} equal rounds, and a step has {micro_batches}: make it {near} or "
            f"{near + layout.pipeline}"
        )


def _too_few_blocks(schedule: Schedule, processes: int, blocks: int, altogether: int = 0) -> str:
    """`altogether`: processes of the run, which a pipeline must divide; 0: not known."""
    each = stages_per_rank(schedule)
    most = blocks // each
    near = max((n for n in range(2, most + 1) if altogether % n == 0), default=None)
    instead = "a pipeline needs a deeper model; leave it out"
    if most > 1:
        instead = f"none up to {most} divides {altogether} processes: leave it out, or start a multiple of {most}"
    if near is not None:
        copies = altogether // near if schedule in V_SHAPED else 1  # which such a schedule takes, and no shards
        more = f" --set parallel.replicate={copies} --set parallel.shard=1" if copies > 1 else ""
        instead = f"try --set parallel.pipeline={near}{more}"
    return (
        f'parallel.pipeline {processes} with schedule = "{schedule}" needs {processes * each} stages of a block or '
        f"more, and the model has {blocks} blocks: {instead}"
    )


def _costs(config: ModelConfig) -> list[int]:
    """Weights that a token passes through, block by block; what stands behind the last block counts with it.

    Of the embedding a token reads one row, which weighs nothing here.
    """
    costs = [_active(block, config.hidden_size) for block in config.blocks]
    head = config.vocab_size * config.hidden_size
    costs[-1] += head + config.hidden_size
    for block in config.mtp:
        costs[-1] += _active(block, config.hidden_size) + (2 * config.hidden_size + 3) * config.hidden_size + head
    return costs


def _active(block: BlockConfig, hidden_size: int) -> int:
    attention: int = block.attention.num_parameters(hidden_size)
    return attention + block.feed_forward.num_active_parameters(hidden_size) + 2 * hidden_size


def _even_ends(costs: Sequence[int], pieces: int) -> list[int]:
    """Where each piece ends: the dearest is as cheap as can be, and the others as even as that leaves them."""
    sums = (0, *accumulate(costs))
    dearest, _ = _best_ends(sums, pieces, lambda cost: cost, max)
    return _best_ends(sums, pieces, lambda cost: cost**2 if cost <= dearest else float("inf"), lambda a, b: a + b)[1]


def _best_ends(
    sums: Sequence[int], pieces: int, worth: Callable[[int], float], join: Callable[[Any, Any], Any]
) -> tuple[float, list[int]]:
    """The cut of least worth, and that worth: `sums` are those of the costs before each place."""
    total = len(sums) - 1
    best: dict[int, tuple[float, list[int]]] = {0: (0, [])}
    for piece in range(1, pieces + 1):
        following = {}
        for end in range(piece, total - (pieces - piece) + 1):
            starts = [start for start in best if start < end]
            value, start = min((join(best[start][0], worth(sums[end] - sums[start])), start) for start in starts)
            following[end] = (value, [*best[start][1], end])
        best = following
    return best[total]
