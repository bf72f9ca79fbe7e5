"""What must hold before a run starts: device, place, room on the disk, processes, data that fits; what is said then."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finemoe.checkpoint.portability import portability
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import logger
from finemoe.data.batch import Batch
from finemoe.methods import build
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure
from finemoe.parallel.config import Layout, Start
from finemoe.parallel.seat import seat
from finemoe.parallel.stages import refusals, stages_per_rank
from finemoe.runs.config import RunConfig, TrainingConfig
from finemoe.runs.footprint import require_memory
from finemoe.runs.trackers import require_tracker
from finemoe.training.method import Method, TrainingData
from finemoe.training.trainer import Trainer

_NAME = re.compile(
    r"[^\W_][^/\\\x00-\x1f\x7f]{0,99}"
)  # its first sign is a letter or a digit: no option, nothing hidden

_MOST_BYTES = 220  # of a folder's name most systems hold 255, and the date is part of it

_TRIED = 50  # layouts of so many processes, of which the first that fits is named

_MUCH = 2**30  # bytes of checkpoints that are worth a word


def default_directory(name: str) -> Path:
    """A new folder in runs/ for what a recipe calls itself.

    Raises:
        ConfigError: that could lead out of runs/, or is no name for a folder.
    """
    if not _NAME.fullmatch(name) or not name.isprintable() or len(os.fsencode(name)) > _MOST_BYTES:
        raise ConfigError(
            f"`name` {name[:60]!r} becomes a folder in runs/, so it must begin with a letter or digit, hold no slash "
            f"and no invisible sign, and be of at most 100 characters or {_MOST_BYTES} bytes: change it, or say where "
            "to write with --out"
        )
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def checkpoint_bytes(config: RunConfig) -> int:
    """What a run holds on disk at most: checkpoints kept and one being written, weights and moments each."""
    size = measure(config.model, config.data.sequence_length)
    parameters = size.total_parameters + size.mtp_parameters
    each = 4 + config.optimizer.most_state_bytes
    return each * parameters * (config.training.keep_checkpoints + 1) + (16 << 20)


def check_start(config: RunConfig, directory: Path, copies: int = 1, at_once: int = 1) -> None:
    """Find before any work what would stop a run: device, trackers, an unusable place, too little memory or room.

    Args:
        config: of the run.
        directory: where it would be written.
        copies: how many such runs are to lie there.
        at_once: how many of them go at the same time.

    Raises:
        ConfigError: the device or a tracker is not there.
        RunError: `directory` cannot be written, the disk is too small, or memory is.
    """
    check_memory(config, at_once)
    for name in config.training.trackers:
        require_tracker(name)
    needed = copies * checkpoint_bytes(config)
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise RunError(f"{existing} is a file; choose another --out")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"{directory}: checkpoints need {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; "
            "free some space, or choose another --out"
        )
    if not os.access(existing, os.W_OK):
        raise RunError(f"{existing} is not writable; choose another --out")


def check_memory(config: RunConfig, at_once: int = 1) -> None:
    """Check that the run, or so many of them at a time, fits into memory, a process's pieces at a time.

    Raises:
        ConfigError: the device is not there, or `[parallel]` does not fit the processes.
        RunError: it does not fit, and `training.memory_check` is on.
    """
    device, bf16 = resolve_device(config.training)
    layout, here = layout_here(config)
    others = _nearby(config, layout) if layout.processes > 1 else ()
    require_memory(config, device, bf16=bf16, at_once=at_once, layout=layout, here=here, others=others)


def layout_here(config: RunConfig) -> tuple[Layout, int]:
    """The layout of the processes that are running, and how many of them are on this machine.

    Alone, as where a run is only checked, that of as many as `[parallel]` asks for, each on a machine of its own.

    Raises:
        ConfigError: `[parallel]` does not fit the processes.
    """
    here = seat()
    if here is None:
        return layout_of(config, config.parallel.least), 1
    return layout_of(config, here.processes), here.local_processes


def layout_of(config: RunConfig, processes: int, start: Start = "torchrun") -> Layout:
    """`[parallel]` of a run by so many processes; arguments and errors as of `ParallelConfig.layout`."""
    return config.parallel.layout(processes, start, _experts(config) or 1)


def _experts(config: RunConfig) -> int:
    """What divides the routed experts of every layer; 0 where none routes."""
    layers = (config.model.blocks[number].feed_forward for number in config.model.moe_layers)
    return math.gcd(*(layer.num_routed_experts for layer in layers if isinstance(layer, MoEConfig)))


def _nearby(config: RunConfig, layout: Layout) -> Iterator[Layout]:
    """Other layouts of as many processes that the run could have, then of more; those that change least first."""
    for times in (1, 2, 4, 8, 16):
        count = times * layout.processes // layout.context
        shares = [(pipeline, count // pipeline) for pipeline in range(1, count + 1) if count % pipeline == 0]
        found = [
            replace(layout, pipeline=pipeline, replicate=copies, shard=rest // copies, expert=expert)
            for pipeline, rest in shares
            for copies in range(1, rest + 1)
            if rest % copies == 0
            for expert in range(1, rest // copies * layout.context + 1)
            if rest // copies * layout.context % expert == 0
        ]
        wanted = (layout.pipeline, layout.replicate, layout.expert)
        found.sort(key=lambda one: _changes(wanted, (one.pipeline, one.replicate, one.expert)))
        for one in found[:_TRIED]:
            with contextlib.suppress(ConfigError):
                refuse_layout(config, one)
                yield one


def _changes(wanted: tuple[int, ...], got: tuple[int, ...]) -> tuple[int, ...]:
    """How many sizes differ; a pipeline is the last that one wants to change."""
    apart = [int(one != other) for one, other in zip(wanted, got, strict=True)]
    return (apart[0], sum(apart), *got)


def build_method(config: RunConfig, directory: Path | None = None) -> Method[Any]:
    """How the run trains, with its data read and checked against the model; `directory`: of the run, if it is one.

    Raises:
        ConfigError, DataError: it does not fit.
    """
    method = build(config.method, config.trainable, replace(config.setting, directory=directory))
    ids = method.data.tokenizer.vocab_size
    if ids > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is below the tokenizer's {ids} ids: set model.vocab_size={ids}"
        )
    return method


def in_steps(config: RunConfig, data: TrainingData[Batch]) -> RunConfig:
    """`config` with its length in steps where it was given in epochs of `data`."""
    if config.training.epochs is None:
        return config
    steps = max(1, round(config.training.epochs * data.sequences_per_epoch / config.sequences_per_step))
    training = config.training.model_copy(update={"steps": steps, "epochs": None})
    return config.model_copy(update={"training": training})


def resolve_device(training: TrainingConfig) -> tuple[torch.device, bool]:
    """Where to compute, and whether in bf16.

    Raises:
        ConfigError: that device is not there.
    """
    name = training.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise ConfigError(f'training.device = "{name}" is not available here; use "auto"')
    bf16 = training.precision == "bf16" or (training.precision == "auto" and name == "cuda")
    return torch.device(name), bf16


def refuse_layout(config: RunConfig, layout: Layout) -> None:
    """Refuse what would fail, hang or be silently wrong.

    Raises:
        ConfigError: naming the setting, its value and values that work.
    """
    sequences = config.sequences_per_step
    if sequences % layout.data:
        length = config.data.sequence_length
        raise ConfigError(
            f"training.tokens_per_step {config.training.tokens_per_step} is {sequences} sequences, which "
            f"{layout.data} processes cannot share evenly: make it a multiple of {layout.data * length}"
        )
    if layout.processes > 1 and config.method.kind == "grpo":
        raise ConfigError(
            f"method.kind 'grpo' writes its answers by one engine in one process, and there are {layout.processes}: "
            "train it by one process, without torchrun"
        )
    if layout.context > 1:
        _refuse_context(config, layout)
    _refuse_pipeline(config, layout)
    for number in config.model.moe_layers:
        layer = config.model.blocks[number].feed_forward
        assert isinstance(layer, MoEConfig)  # as `moe_layers` says
        experts = layer.num_routed_experts
        if experts % layout.expert:
            both = math.gcd(_experts(config), layout.fsdp)
            fits = [n for n in range(2, both + 1) if both % n == 0]
            instead = f"try one of 1, {', '.join(map(str, fits))}"
            alone = f"no number of {layout.fsdp} processes does but 1: leave it out, or change num_routed_experts"
            raise ConfigError(
                f"parallel.expert {layout.expert} does not divide the {experts} routed experts of layer {number}: "
                f"{instead if fits else alone}"
            )
    if layout.expert > 1 and not config.model.moe_layers:
        raise ConfigError(f"parallel.expert {layout.expert}: the model has no routed experts; leave it out")
    if layout.fsdp == 1:
        return
    instead = f"{_in_copies(layout)} works"
    if getattr(config.method, "policy", "off") == "on":
        raise ConfigError(
            'method.policy = "on" writes answers of different lengths on every process, and parallel.shard wants all '
            f"to go through the model together: {instead}"
        )
    if config.optimizer.kind == "muon":
        raise ConfigError(f"optimizer.kind 'muon' needs whole matrices, and parallel.shard cuts them: {instead}")
    if config.trainable.kind not in ("everything", "names"):
        raise ConfigError(
            f"trainable.kind {config.trainable.kind!r} trains tensors of its own beside whole weights, and "
            f"parallel.shard cuts those: {instead}"
        )


def _in_copies(layout: Layout) -> str:
    """In settings, a layout that shards nothing, of as many processes."""
    others = {name: 1 for name in ("context", "expert") if getattr(layout, name) > 1}
    sizes = {"replicate": layout.replicate * layout.fsdp, "shard": 1, **others}
    return " ".join(f"--set parallel.{name}={size}" for name, size in sizes.items())


def _refuse_pipeline(config: RunConfig, layout: Layout) -> None:
    """Refuse what a model in stages cannot do."""
    share = config.sequences_per_step // layout.data
    more = _more_micro_batches(config, layout, share)
    refusals(layout, config.model, -(-share // config.micro_batch_sequences), more)
    if layout.pipeline == 1:
        return
    said = f"parallel.pipeline {layout.pipeline}"
    if config.trainable.kind not in ("everything", "names"):
        raise ConfigError(
            f"trainable.kind {config.trainable.kind!r} keeps what belongs to the whole model, and {said} cuts it into "
            f"stages: {_in_copies(replace(layout, replicate=layout.pipeline * layout.replicate))} "
            "--set parallel.pipeline=1 works"
        )
    if layout.context > 1:
        raise ConfigError(f"{said} with parallel.context {layout.context} is not built: leave one of them out")
    if getattr(config.method, "samples", 0):
        raise ConfigError(f"{said}: a model in stages cannot write answers meanwhile; set method.samples = 0")


def _more_micro_batches(config: RunConfig, layout: Layout, share: int) -> str:
    """In settings, as many of them as a pipeline has stages; `share` are the sequences of one rank."""
    count, length = layout.pipeline * stages_per_rank(layout.schedule), config.data.sequence_length
    if share >= count:
        return f"--set training.micro_batch_tokens={share // count * length}"
    step = count * layout.data * length
    return f"--set training.tokens_per_step={step} --set training.micro_batch_tokens={length}"


def _refuse_context(config: RunConfig, layout: Layout) -> None:
    """Refuse what sequences in pieces cannot do."""
    said, length = f"parallel.context {layout.context}", config.data.sequence_length
    if length % layout.context:
        raise ConfigError(f"{said} does not divide data.sequence_length {length}: make it a multiple")
    if config.method.kind != "pretraining":
        raise ConfigError(
            f"{said} cuts rows of documents, and method.kind {config.method.kind!r} has none: leave it out"
        )
    if config.model.mtp:
        raise ConfigError(f"{said} cuts the look-ahead of prediction modules: set model.mtp_depth = 0, or leave it out")
    for number, block in enumerate(config.model.blocks):
        if block.attention.kind != "latent":
            raise ConfigError(
                f"{said} sends latents between processes, and layer {number} has {block.attention.kind} attention: "
                "leave it out"
            )
        if isinstance(block.feed_forward, MoEConfig) and block.feed_forward.capacity_factor is not None:
            raise ConfigError(f"{said}: a capacity counts whole sequences; leave capacity_factor or it out")


def capacity_shares(config: RunConfig, layout: Layout) -> int:
    """How many processes count a capacity, each over its own micro-batches; 1 where nothing is dropped."""
    layers = (block.feed_forward for block in (*config.model.blocks, *config.model.mtp))
    drops = any(isinstance(one, MoEConfig) and one.capacity_factor is not None for one in layers)
    return layout.data if drops else 1


def announce(config: RunConfig, trainer: Trainer, directory: Path, reason: str) -> None:
    """Say what is trained, by what, for how long, and what it can be exported to; `reason`: of the kernels."""
    kernels = trainer.model.kernels
    size = measure(config.model, config.data.sequence_length)
    logger.info(
        "%s: %.2fM parameters, %.2fM active; %s, %s, %d thread%s; kernels: attention %s, experts %s, products %s",
        directory,
        size.total_parameters / 1e6,
        size.active_parameters / 1e6,
        trainer.plan.device,
        "bf16" if trainer.plan.bf16 else "fp32",
        torch.get_num_threads(),
        "s" * (torch.get_num_threads() > 1),
        kernels.attention,
        kernels.experts,
        kernels.products,
    )
    if reason:
        logger.info("kernels chosen by measuring: %s", reason)
    logger.info("%s", _length(config))
    if config.training.max_tokens is not None and config.schedule.kind != "constant":
        logger.warning(
            "training.max_tokens may end the run before its schedule does, which counts %d steps: "
            'schedule.kind = "constant" does not mind',
            config.training.total_steps,
        )
    if (nbytes := checkpoint_bytes(config)) > _MUCH:
        logger.info(
            "checkpoints take up to %.1f GiB on the disk: the last %d are kept, and one is written beside them; "
            "training.keep_checkpoints = 1 keeps the last alone",
            nbytes / 2**30,
            config.training.keep_checkpoints,
        )
    for note in trainer.method.notes:
        logger.info("%s", note)
    logger.info("%s", portability(config.model).sentence())
    if trainer.world.size > 1:
        logger.info("%d processes: %s", trainer.world.size, trainer.world.layout)
    if (shares := capacity_shares(config, trainer.world.layout)) > 1:
        logger.info(
            "capacity_factor counts the micro-batches of each process by themselves (%d): another number of processes "
            "may drop other tokens",
            shares,
        )
    if trainer.state.step:
        logger.info("resuming after step %d", trainer.state.step)


def _length(config: RunConfig) -> str:
    training = config.training
    total = training.total_steps * training.tokens_per_step
    said = f"{training.total_steps} steps of {training.tokens_per_step} tokens"
    if training.max_tokens is not None:
        return f"at most {said}, and at most {training.max_tokens:,} tokens: the step that reaches them is the last"
    if training.tokens is None or total == training.tokens:
        return said
    return f"{said}: {total:,} of the {training.tokens:,} tokens asked for, as steps are whole"
