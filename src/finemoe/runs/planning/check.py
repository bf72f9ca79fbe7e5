"""What a recipe will take, before it is run: everything is read, a few real steps are measured, no run is left."""

from __future__ import annotations

import math
import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from finemoe.charts.numbers import count, duration
from finemoe.core import memory
from finemoe.core.errors import FinemoeError, RunError
from finemoe.core.logs import progress
from finemoe.model.size import measure
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.directory import require_free
from finemoe.runs.footprint import footprint, require_memory
from finemoe.runs.planning.machine import other_work
from finemoe.runs.planning.pace import Pace, about_writing
from finemoe.runs.run import evaluate_every, first_trainer
from finemoe.runs.start import (
    build_method,
    check_memory,
    check_start,
    checkpoint_bytes,
    default_directory,
    in_steps,
    layout_here,
    refuse_layout,
    resolve_device,
)
from finemoe.training.method import Method
from finemoe.training.trainer import Trainer

STEPS = 10
SECONDS = 60.0
"""Of steps that are measured: no more are begun after it, but for a second one."""

Recipe = str | os.PathLike[str] | Mapping[str, Any] | RunConfig


@dataclass(frozen=True)
class Check:
    """What a run will take. What could not be found out, because something before it was refused, is None."""

    recipe: str
    refused: tuple[str, ...]
    """What `finemoe train` would refuse, and how to mend it; empty: it will start."""
    total_parameters: int
    active_parameters: int
    steps: int
    tokens: int
    """That the run trains on."""
    documents: int | None = None
    training_tokens: int | None = None
    """In the corpus."""
    validation_tokens: int | None = None
    vocab_size: int | None = None
    """Of the tokenizer."""
    steps_measured: int = 0
    tokens_per_second: float | None = None
    """Of training, in the median step."""
    validation_seconds: float | None = None
    """Of one validation."""
    validations: int = 0
    seconds: float | None = None
    """That the run will take, on this machine as it is now."""
    seconds_a_step: float | None = None
    """The median, all of it: what a model learns from itself is written and judged in it."""
    losses: tuple[float, ...] = ()
    """Of the steps that were measured; none where a model is rewarded."""
    rewards: tuple[float, ...] = ()
    """Of the same steps, where it is."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of a step's time, by what it was spent on, where a model writes itself what it learns."""
    writes: bool = False
    """It does, so that `tokens` are at most as many."""
    memory_bytes: int | None = None
    """Of this process at the height of a step; on CUDA, of the device."""
    memory_available_bytes: int | None = None
    """Before anything was allocated."""
    layout: str | None = None
    """Of several processes, in words."""
    process_bytes: int | None = None
    """Of each of several processes at the height of a step, as estimated: what the run is refused by."""
    checkpoint_copy_bytes: int = 0
    """More, for a moment, while a checkpoint is written behind training."""
    disk_bytes: int = 0
    disk_free_bytes: int | None = None
    computes: str | None = None
    """Device, precision, threads, kernels."""
    notes: tuple[str, ...] = ()
    """What trains besides the next token; which kernels were chosen and why; what is worth knowing."""

    @property
    def passes(self) -> float | None:
        """How often the run reads the corpus."""
        return self.tokens / self.training_tokens if self.training_tokens else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "passes": self.passes}

    def __str__(self) -> str:
        """The report, a line for each figure, within 80 columns."""
        return "\n".join(
            textwrap.fill(text, 80, initial_indent=f"{title:<12}", subsequent_indent=" " * 12, break_long_words=False)
            for title, text in self._lines()
        )

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "Recipe", self.recipe
        if self.documents is not None:
            documents = "1 document" if self.documents == 1 else f"{self.documents:,} documents"
            yield "Text", f"{documents}; a vocabulary of {self.vocab_size:,}"
            yield (
                "",
                f"{count(self.training_tokens)} tokens to train on, {count(self.validation_tokens)} to validate on",
            )
        yield "Model", f"{count(self.total_parameters)} parameters, {count(self.active_parameters)} active"
        times = f", {self.passes:.2g} times the text" if self.passes is not None else ""
        most = "at most " if self.writes else ""
        yield "Training", f"{most}{count(self.tokens)} tokens in {self.steps:,} steps{times}"
        yield from self._pace()
        if self.seconds is not None and self.validation_seconds is not None:
            validating = f"{self.validations} validations of {duration(self.validation_seconds)} included"
            yield "Time", f"about {duration(self.seconds)}, {validating}"
        if self.process_bytes is not None:
            yield "Processes", f"{self.layout}: each takes about {_size(self.process_bytes)} at its height"
        if self.memory_bytes is not None:
            left = self.memory_available_bytes
            there = f"; {_size(left)} available" if left is not None else ""
            yield "Memory", f"{_size(self.memory_bytes)} at its height{there}"
            yield "", f"{_size(self.checkpoint_copy_bytes)} more while a checkpoint is copied"
        free = f"; {_size(self.disk_free_bytes)} free" if self.disk_free_bytes is not None else ""
        yield "Disk", f"{_size(self.disk_bytes)} for checkpoints{free}"
        if self.computes is not None:
            yield "Computes", self.computes
        for note in self.notes:
            yield "", note
        if not self.refused:
            yield "Refused", "nothing: the run can start"
        for refusal in self.refused:
            yield "Refused", refusal

    def _pace(self) -> Iterator[tuple[str, str]]:
        if self.tokens_per_second is not None:
            over = "1 step" if self.steps_measured == 1 else f"{self.steps_measured} steps"
            step = f"{duration(self.seconds_a_step)} a step, " if self.writes else ""
            yield "Speed", f"{step}{count(self.tokens_per_second)} tokens/s, measured over {over}"
        if self.shares:
            yield "", "a step's time: " + ", ".join(f"{said} {share:.0%}" for said, share in self.shares.items())
        for what, found in (("loss", self.losses), ("reward", self.rewards)):
            if found:
                yield "", f"{what} {found[0]:.3f} at first, {found[-1]:.3f} in the last of them"


def check(
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    steps: int = STEPS,
    seconds: float = SECONDS,
) -> Check:
    """Read everything that a run would, measure a few of its steps on its data, and say what it takes.

    No run directory is made. The corpus is tokenised into the cache, where the run will find it.

    Args:
        recipe: as of `train`.
        out: the run directory to be; `runs/<name>-<date>` when None.
        overrides: `a.b=c`, for a path or a mapping.
        quiet: show no progress.
        steps: how many to measure.
        seconds: fewer steps are measured where they take longer: two, or one that takes longer itself.

    Raises:
        KeyboardInterrupt: Ctrl-C, at once: there is nothing to save.
        ConfigError: the recipe itself is no configuration of a run; all else that is wrong is in `refused`.
    """
    if isinstance(recipe, RunConfig):
        config, source = recipe, recipe.name
    else:
        raw, source = read_recipe(recipe, overrides)
        config = resolve_run(raw, source)
    directory = Path(out) if out is not None else default_directory(config.name)
    found = _Findings(source, config)
    found.attempt(lambda: require_free(directory, config))
    found.attempt(lambda: check_start(config, directory))
    free = _free(directory)
    method = found.attempt(lambda: build_method(config))
    if method is not None:
        config = found.config = in_steps(config, method.data)
    elif config.training.epochs is not None:  # it is refused: one step stands for a length that nobody knows
        unknown = config.training.model_copy(update={"epochs": None, "steps": 1})
        config = found.config = config.model_copy(update={"training": unknown})
    measurable = found.attempt(lambda: _measurable(config, found))
    if method is not None:
        with closing(method):
            found.add(**_of_data(method), writes=method.asks is not None, notes=method.notes)
            if measurable:
                found.attempt(lambda: found.add(**_measured(config, method, steps, seconds, quiet)))
    return found.check(free)


@dataclass
class _Findings:
    """What is known so far."""

    source: str
    config: RunConfig
    refused: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` gives; None, and one refusal more, where it raises an error of ours."""
        try:
            return action()
        except (FinemoeError, MemoryError, torch.OutOfMemoryError) as error:
            message = str(error) or "there is not enough memory: lower training.micro_batch_tokens"
            if message not in self.refused:
                self.refused.append(message)
            return None

    def add(self, **facts: Any) -> None:
        """Facts; notes are added to those that are there."""
        notes = (*self.facts.get("notes", ()), *facts.pop("notes", ()))
        self.facts |= {**facts, "notes": notes}

    def check(self, free: int | None) -> Check:
        """All of it."""
        config, training = self.config, self.config.training
        size = measure(config.model, config.data.sequence_length)
        parameters = size.total_parameters + size.mtp_parameters
        tokens = training.total_tokens
        each = min(self.facts.pop("tokens_a_step", 0) or math.inf, training.tokens_per_step)  # GRPO's may be short
        steps = min(training.total_steps, math.ceil(tokens / each))
        validations = -(-steps // evaluate_every(config))
        if steps < training.total_steps:
            most = f"all of its {training.total_steps:,} steps"
            self.add(notes=(f"training.max_tokens ends it before {most}, if they stay as long as the first ones",))
        facts = self.facts
        if facts.get("seconds_a_step"):
            facts["seconds"] = steps * facts["seconds_a_step"] + validations * facts["validation_seconds"]
        return Check(
            recipe=self.source,
            refused=tuple(self.refused),
            total_parameters=size.total_parameters,
            active_parameters=size.active_parameters,
            steps=steps,
            tokens=tokens,
            validations=validations,
            checkpoint_copy_bytes=12 * parameters,
            disk_bytes=checkpoint_bytes(config),
            disk_free_bytes=free,
            **facts,
        )


def _measurable(config: RunConfig, found: _Findings) -> bool:
    """Whether the run can be computed, in this memory, and its steps be measured by this process; what several take.

    Raises:
        ConfigError, RunError: it cannot be computed.
    """
    layout, _ = layout_here(config)
    refuse_layout(config, layout)
    check_memory(config)
    if layout.processes == 1:
        return True
    device, bf16 = resolve_device(config.training)
    needed = footprint(config, bf16=bf16, layout=layout).needed
    found.add(layout=str(layout), process_bytes=needed, notes=("measured with one process, which holds all",))
    try:
        require_memory(config, device, bf16=bf16)
    except RunError:
        found.facts["notes"] = (*found.facts["notes"][:-1], "no step was measured: one process alone cannot hold all")
        return False
    return True


def _free(directory: Path) -> int | None:
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _of_data(method: Method[Any]) -> dict[str, Any]:
    report = method.data.report
    return {
        "documents": report.get("documents_read"),
        "training_tokens": report.get("tokens", {}).get("train"),
        "validation_tokens": report.get("tokens", {}).get("validation"),
        "vocab_size": method.data.tokenizer.vocab_size,
    }


def _measured(config: RunConfig, method: Method[Any], steps: int, seconds: float, quiet: bool) -> dict[str, Any]:
    """Speed, memory and first losses of the run's own beginning; this process's random state and threads stay.

    Raises:
        TrainingError: a loss is not finite.
    """
    steps = min(steps, config.training.total_steps)
    with _undisturbed():
        available = memory.available_on(resolve_device(config.training)[0])  # before any of it is taken
        memory.forget_peak()
        trainer, reason = first_trainer(config, method)
        with _shown("measuring", steps, quiet) as advance:
            pace = Pace(advance)
            trainer.model.train()
            # not `run`, which ends behind a whole step when a signal comes, so that it can be saved
            while len(pace.seconds) < steps and not pace.is_enough(seconds):
                began = time.perf_counter()  # what a model learns from itself it writes with the batch
                pace.note(trainer.step(trainer.micro_batches(), began))
        started = time.perf_counter()
        trainer.measure()
        validation = time.perf_counter() - started
        on_cuda = trainer.plan.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_cuda else memory.peak_bytes()
        each, own = trainer.state.tokens / len(pace.seconds), method.asks is not None
        return {
            "steps_measured": len(pace.seconds),
            "losses": () if own else tuple(pace.losses),  # a policy gradient's says nothing
            "rewards": tuple(pace.rewards),
            "shares": pace.shares_of_a_step(),
            "tokens_a_step": each,
            "seconds_a_step": pace.seconds_a_step(),
            "tokens_per_second": (each if own else config.training.tokens_per_step) / pace.seconds_a_step(),
            "validation_seconds": validation,
            "memory_bytes": peak,
            "memory_available_bytes": available,
            "computes": _computes(trainer),
            "notes": (
                *pace.caveat(steps),
                *about_writing(config.method, own),
                *_busy(),
                *((f"kernels by measuring: {reason}",) if reason else ()),
            ),
        }


def _busy() -> Iterator[str]:
    """What falsifies the times, and on a CPU what there is against it: idle threads that wait awake take cores too."""
    if (work := other_work()) is not None:
        yield f"measured {work}: alone it will be faster"
        if torch.get_num_threads() > 1:
            yield "where other work stays, OMP_WAIT_POLICY=passive before the command may be several times faster"


def _computes(trainer: Trainer) -> str:
    kernels, plan = trainer.model.kernels, trainer.plan
    precision = "bf16" if plan.bf16 else "fp32"
    chosen = f"attention {kernels.attention}, experts {kernels.experts}, products {kernels.products}"
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    return f"{plan.device}, {precision}, {threads}; {chosen}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Threads and random state as they were before."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _shown(what: str, steps: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    if quiet:
        yield lambda _: None
        return
    with progress(what, steps, "steps") as advance:
        yield advance


def _size(value: int | None) -> str:
    """412 MiB, 21.3 GiB."""
    mebibytes = (value or 0) / 2**20
    return f"{mebibytes:,.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:,.1f} GiB"
