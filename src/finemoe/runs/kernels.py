"""Which kernels a run computes with: named by its configuration, measured once, and then the run's own."""

from __future__ import annotations

import json

import torch

from finemoe.checkpoint.run_state.state import RunState
from finemoe.core.config import parse
from finemoe.core.logs import logger
from finemoe.model import native
from finemoe.runs.calibration import Chosen, choose
from finemoe.runs.config import RunConfig
from finemoe.runs.start import resolve_device


def kernels_for(config: RunConfig, resumed: RunState | None = None) -> Chosen:
    """Those that the configuration names, and for "auto" what is fastest; a resumed run keeps what it had.

    Other kernels round differently, and the rest of the run would not be bit for bit what it would have been. Sets
    the number of threads, by which they are measured.
    """
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    if resumed is not None and "kernels" in resumed.state:
        had = config.kernels.model_copy(update=resumed.state["kernels"])
        if parse(RunConfig, json.loads(resumed.config), "checkpoint").kernels == config.kernels:
            if "native" in (had.experts, had.products) and not native.available():
                logger.warning("this run used the native kernels, which cannot be used here: it will round differently")
            return Chosen(had, "")
    device, bf16 = resolve_device(config.training)
    tokens = config.micro_batch_sequences * config.data.sequence_length
    return choose(config.model, config.kernels, tokens=tokens, device=device, bf16=bf16)


def is_same_run(asked: RunConfig, found: RunConfig) -> bool:
    """Whether the run that `found` describes is the one that `asked` would begin, whatever its kernels came to be."""
    auto = {name: value for name, value in found.kernels if getattr(asked.kernels, name) == "auto"}
    return asked.model_copy(update={"kernels": asked.kernels.model_copy(update=auto)}) == found
