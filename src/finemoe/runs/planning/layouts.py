"""Whether a run by many processes is the run of one: a few steps by every layout that fits on this machine.

In float64 (`in_double`): in float32 the order of additions decides near-ties of routers, and Adam makes whole steps of
gradients that are next to nothing, so that a right layout looks wrong after a step or two.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finemoe.checkpoint.run_state.state import MODEL
from finemoe.core.config import to_json
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import logger
from finemoe.parallel.config import Layout, ParallelConfig
from finemoe.parallel.seat import cores
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.start import layout_of, refuse_layout, resolve_device
from finemoe.training.directory import read_metrics, read_summary

MOST_LOSS, MOST_NORM, MOST_WEIGHT = 1e-9, 1e-9, 1e-9
"""Nats, relative, absolute. The order of additions did 2e-15, 4e-16 and 1e-13 to four steps of recipes/ladder/v3.toml
in float64."""

_RUN = "finemoe.runs.planning.in_double"
_IN_DOUBLE = {"attention": "sdpa", "experts": "sorted_slices", "products": "torch"}
"""Kernels that know float64."""

_VALIDATED = 4096  # tokens, of a figure that is not compared


Loads = dict[str, list[int]]
"""[experts] tokens of a step, by number of the layer."""


@dataclass(frozen=True)
class LayoutCheck:
    """How far the steps of a layout are from those of one process."""

    layout: str
    processes: int
    loss: float | None
    """[nats] The largest difference of a step."""
    gradient_norm: float | None
    """[relative] The largest difference of a step."""
    weights: float | None
    """[absolute] The largest difference after the last step."""
    loads_equal: bool | None
    """Every expert of every layer took as many tokens in every step; None where nothing routes."""
    seconds_per_step: float | None
    loads_apart: str | None = None
    """How many choices of experts differ, of how many, and where first."""
    failure: str | None = None
    """What the processes said, where they did not come to the end."""
    own: bool = False
    """It is what the recipe's own `[parallel]` asks for."""

    @property
    def agrees(self) -> bool:
        """Whether nothing but rounding is between them."""
        if self.loss is None or self.gradient_norm is None or self.weights is None:
            return False
        near = self.loss <= MOST_LOSS and self.gradient_norm <= MOST_NORM and self.weights <= MOST_WEIGHT
        return near and self.loads_equal is not False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "agrees": self.agrees}


@dataclass(frozen=True)
class _Done:
    losses: list[float]
    norms: list[float]
    loads: list[Loads]
    weights: dict[str, Tensor]
    seconds: float


def verify_parallel(
    recipe: str | os.PathLike[str] | dict[str, Any],
    *,
    processes: int | None = None,
    steps: int = 4,
    overrides: Sequence[str] = (),
    tell: Callable[[LayoutCheck], None] = lambda found: None,
) -> list[LayoutCheck]:
    """Train a few steps of a recipe by one process, and by every layout that fits; compare them.

    Each run is what `torchrun -m finemoe train` does, in float64 and in a folder that is removed afterwards. Rounding
    in float32, and the kernels that only know float32, are not looked at here: tests compare them.

    Args:
        recipe: as in `train`.
        processes: at most; as many as there are cores, and at least 2, when None.
        steps: of each run.
        overrides: `a.b=c`.
        tell: called with each result as soon as it is there.

    Raises:
        ConfigError: the recipe cannot work.
        RunError: the run by one process fails.
    """
    config = _short(resolve_run(*read_recipe(recipe, overrides)), steps)
    device, _ = resolve_device(config.training)
    here = torch.cuda.device_count() if device.type == "cuda" else cores()
    if device.type == "mps" or (device.type == "cuda" and here < 2):  # processes meet over other devices alone
        config, here = (
            config.model_copy(update={"training": config.training.model_copy(update={"device": "cpu"})}),
            cores(),
        )
    most = processes or max(2, here)
    own, wanted = own_layout(config), list(fitting(config, most))
    _announce(own, wanted, most)
    with tempfile.TemporaryDirectory(prefix="finemoe-layouts-") as folder:
        logger.info("one process: %d step%s", steps, "s" * (steps > 1))
        alone = _run(config, Layout(), Path(folder) / "one")
        if isinstance(alone, str):
            raise RunError(f"the run by one process fails already: {alone}")
        found = []
        for number, layout in enumerate(wanted):
            logger.info("%d processes: %s", layout.processes, layout)
            done = _run(config, layout, Path(folder) / str(number))
            found.append(replace(_compared(layout, done, alone), own=layout == own))
            tell(found[-1])
    return found


def own_layout(config: RunConfig) -> Layout | None:
    """The smallest that the recipe's `[parallel]` asks for; None where it asks for one process, or for nothing.

    Raises:
        ConfigError: there is none.
    """
    layout = layout_of(config, config.parallel.least)
    if layout.pipeline == 1:  # which has no order of its own
        layout = replace(layout, schedule=Layout.schedule)
    return layout if layout.processes > 1 else None


def _announce(own: Layout | None, wanted: Sequence[Layout], most: int) -> None:
    """Say which layouts are run, and whether the recipe's own is among them."""
    named = [f"{layout} (the recipe's own)" if layout == own else str(layout) for layout in wanted]
    logger.info("one process is compared with: %s", "; ".join(named) or "nothing, as no layout fits")
    if own is None or own in wanted:
        return
    if own.processes > most:
        logger.warning(
            "the recipe's own layout, %s, is not among them: it takes %d processes, and %d at most are tried; "
            "--processes %d runs it too",
            own, own.processes, most, own.processes,
        )  # fmt: skip
    else:
        logger.warning("the recipe's own layout, %s, is not among them: the recipe cannot be trained by it", own)


def fitting(config: RunConfig, most: int) -> Iterator[Layout]:
    """Layouts of at most so many processes that the recipe can be trained by, simple ones first, its own last."""
    wanted = [
        ParallelConfig(replicate=2, shard=1),
        ParallelConfig(shard=2),
        ParallelConfig(shard=2, expert=2),
        ParallelConfig(pipeline=2, shard=1),
        ParallelConfig(pipeline=2, shard=1, schedule="interleaved"),
        ParallelConfig(pipeline=2, shard=1, schedule="zbv"),
        ParallelConfig(pipeline=2, shard=1, schedule="dualpipev"),
        ParallelConfig(context=2, shard=1),
        ParallelConfig(replicate=2, shard=2),
        ParallelConfig(shard=4, expert=2),
        ParallelConfig(shard=4, expert=4),
        ParallelConfig(pipeline=2, shard=2, expert=2),
    ]
    layouts = [parallel.layout(parallel.least) for parallel in wanted]
    own = own_layout(config)
    layouts += [own] if own is not None and own not in layouts else []
    for layout in layouts:
        if layout.processes > most:
            continue
        try:
            refuse_layout(config, layout)
        except ConfigError as error:
            logger.info("left out, %s: %s", layout, error)
            continue
        yield layout


def _short(config: RunConfig, steps: int) -> RunConfig:
    """The first steps of a run, saved at their end, by kernels that know float64."""
    length = {"steps": steps, "tokens": None, "epochs": None}
    rest = {"evaluate_every": steps, "checkpoint_every": steps, "keep_checkpoints": 1, "trackers": ()}
    rest["checkpoint_format"] = "whole"  # compared as one file
    training = config.training.model_copy(update={**length, **rest, "precision": "fp32"})
    validated = min(config.data.max_validation_tokens, max(_VALIDATED, config.data.sequence_length))
    data = config.data.model_copy(update={"max_validation_tokens": validated})
    kernels = config.kernels.model_copy(update=_IN_DOUBLE)
    return config.model_copy(update={"training": training, "data": data, "kernels": kernels})


def _run(config: RunConfig, layout: Layout, out: Path) -> _Done | str:
    """What a layout's steps came to, or the last that its processes said."""
    sizes = {name: size for name, size in asdict(layout).items() if name in ParallelConfig.model_fields}
    training = config.training.model_copy(update={"threads": max(1, cores() // layout.processes)})
    parallel = ParallelConfig(**sizes, timeout=config.parallel.timeout)
    recipe = out.with_suffix(".json")
    recipe.write_text(to_json(config.model_copy(update={"parallel": parallel, "training": training})))
    command = [sys.executable, "-m"]
    if layout.processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.processes), "-m"]
    command += [_RUN, str(recipe), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(training.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("error")]
        return " ".join(said[:1]) or f"exit status {done.returncode}: {done.stderr[-400:]}"
    return _read(out)


def _read(out: Path) -> _Done:
    steps = [record for record in read_metrics(out) if record["kind"] == "step"]
    summary = read_summary(out)
    assert summary is not None  # the run ended well
    [newest] = (out / "checkpoints").glob("step-*")
    return _Done(
        losses=[record["loss"] for record in steps],
        norms=[record["gradient_norm"] for record in steps],
        loads=[record.get("load", {}) for record in steps],
        weights=load_file(newest / MODEL),
        seconds=summary["seconds"] / len(steps),
    )


def _largest(values: Iterable[float]) -> float:
    """Not a number where one of them is not, which `max` may pass over."""
    found = list(values)
    return next((value for value in found if math.isnan(value)), max(found))


def _apart(ours: Sequence[Loads], theirs: Sequence[Loads]) -> str | None:
    """How many choices differ, at least, and where first; None where every expert took as many tokens."""
    differ, where = 0, ""
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        for layer in sorted({*own, *other}, key=int):
            loads = zip_longest(own.get(layer, ()), other.get(layer, ()), fillvalue=0)
            if moved := sum(abs(one - two) for one, two in loads):
                differ += -(-moved // 2)  # a choice that differs is one more here and one less there
                where = where or f"first in step {number}, layer {layer}"
    total = sum(sum(load) for one in theirs for load in one.values())
    return f"{differ:,} of {total:,} choices at least, {where}" if differ else None


def _compared(layout: Layout, done: _Done | str, alone: _Done) -> LayoutCheck:
    name = str(layout)
    if isinstance(done, str):
        return LayoutCheck(name, layout.processes, None, None, None, None, None, failure=done)
    apart = _apart(done.loads, alone.loads)
    return LayoutCheck(
        layout=name,
        processes=layout.processes,
        loss=_largest(abs(ours - theirs) for ours, theirs in zip(done.losses, alone.losses, strict=True)),
        gradient_norm=_largest(abs(a - b) / max(b, 1e-30) for a, b in zip(done.norms, alone.norms, strict=True)),
        weights=_largest(float((done.weights[name] - one).abs().max()) for name, one in alone.weights.items()),
        loads_equal=apart is None if any(alone.loads) else None,
        loads_apart=apart,
        seconds_per_step=round(done.seconds, 4),
    )
