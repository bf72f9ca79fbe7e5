"""What must hold before a run starts: device, place, room on the disk, a method whose data fits the model."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from finemoe.core.errors import ConfigError, RunError
from finemoe.data.batch import Batch
from finemoe.methods import build
from finemoe.model.size import measure
from finemoe.runs.config import RunConfig, TrainingConfig
from finemoe.runs.footprint import require_memory
from finemoe.runs.trackers import require_tracker
from finemoe.training.method import Method, TrainingData

_NAME = re.compile(
    r"[^\W_][^/\\\x00-\x1f\x7f]{0,99}"
)  # its first sign is a letter or a digit: no option, nothing hidden

_MOST_BYTES = 220  # of a folder's name most systems hold 255, and the date is part of it


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
    """What a run holds on disk at most: checkpoints kept and one being written, weights and two moments each."""
    size = measure(config.model, config.data.sequence_length)
    parameters = size.total_parameters + size.mtp_parameters
    return 12 * parameters * (config.training.keep_checkpoints + 1) + (16 << 20)


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
    """Check that the run, or so many of them at a time, fits into memory.

    Raises:
        ConfigError: the device is not there.
        RunError: it does not fit, and `training.memory_check` is on.
    """
    device, bf16 = resolve_device(config.training)
    require_memory(config, device, bf16=bf16, at_once=at_once)


def build_method(config: RunConfig) -> Method[Any]:
    """How the run trains, with its data read and checked against the model.

    Raises:
        ConfigError, DataError: it does not fit.
    """
    method = build(config.method, config.trainable, config.setting)
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
