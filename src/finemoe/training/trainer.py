"""The one trainer. Methods fill its slots; observers watch; nothing else loops over steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finemoe.core.errors import ConfigError, TrainingError
from finemoe.core.logs import logger
from finemoe.data.batch import Batch, columns
from finemoe.model.transformer import Transformer
from finemoe.parallel.passes import Execute
from finemoe.parallel.world import SOLO, World, in_words
from finemoe.training.balancing import selection_biases
from finemoe.training.method import Measured, Method, Selected
from finemoe.training.optimizers import RATE_FACTOR, build_optimizers
from finemoe.training.report import StepReport
from finemoe.training.schedule import learning_rate_factor
from finemoe.training.stopping import StopOnSignal, repeated

_DROPPED = "dropped assignments"  # beside terms while ranks add them up, none of whose names has a space in it


def _generator_states() -> dict[str, Tensor]:
    """State of torch's default generator of each kind of device that is in use here."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With weights, optimizer and the method's state it is all that a bit-exact resume needs."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    """Sequences that the data has given, to all ranks together."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps that held nothing to count."""
    rng: Mapping[str, Tensor] = field(default_factory=_generator_states)
    """State of torch's default generators, by kind of device."""


@dataclass(frozen=True)
class Plan:
    """How steps are cut."""

    total_steps: int
    sequences_per_step: int
    """By all ranks together."""
    sequences_per_micro_batch: int
    """By one rank at once."""
    device: torch.device
    bf16: bool
    """Matrix products in bfloat16 under autocast; weights stay float32."""
    max_tokens: int | None = None
    """Of all ranks together: the step by which so many were read is the last, even if it is not `total_steps`."""


class Observer(Protocol):
    """Told of every step, in list order."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """`trainer.state` already counts this step."""
        ...

    def close(self) -> None:
        """The run ends, well or not."""
        ...


@dataclass(frozen=True)
class _Accumulated:
    """What the micro-batches of a step came to, over all ranks."""

    terms: dict[str, float]
    load: dict[int, Tensor]  # [experts], by layer index
    dropped: int
    arrived: dict[int, int]  # as in `Passes`: here alone


class Trainer:
    """Counts, terms, backward, before the update, update, after it, report (design: two paths to draw from memory)."""

    def __init__(
        self,
        model: Transformer,
        method: Method[Any],
        optimizer: Any,
        schedule: Any,
        plan: Plan,
        observers: Sequence[Observer] = (),
        world: World = SOLO,
        *,
        begins: bool = True,
        execute: Execute | None = None,
        fill: Callable[[Transformer], None] | None = None,
    ) -> None:
        """Let `method` prepare `model`, keep what lies here, freeze what is not selected, build what steps the rest.

        Args:
            model: as the run begins with it, or, where a checkpoint will fill it, of the same shapes.
            method: how it trains.
            optimizer: a configuration of OPTIMIZERS.
            schedule: a configuration of SCHEDULES.
            plan: how steps are cut.
            observers: in order.
            world: the processes that train together.
            begins: False where a checkpoint will replace weights and state.
            execute: runs the micro-batches of a step; None: as the world does.
            fill: gives a model without memory the weights of what lies here, once that is known; not with a method that
                prepares.

        Raises:
            ConfigError: the sequences of a step cannot be shared evenly.
        """
        if plan.sequences_per_step % world.shares:
            raise ConfigError(
                f"{plan.sequences_per_step} sequences a step cannot be shared by {world.shares} processes: make "
                f"training.tokens_per_step a multiple of {world.shares} times data.sequence_length"
            )
        self.model = model
        self.method = method
        self.plan = plan
        self.schedule = schedule
        self.observers = observers
        self.world = world
        self.state = TrainState()
        for check in method.checks:
            check(model)
        for prepare in method.prepare:
            with self.autocast():
                prepare(model, begins)
        world.spread(model, torch.bfloat16 if plan.bf16 else None)
        if fill is not None:
            fill(model)
        self.execute: Execute = execute or world.passes(model)
        selected = self._select()
        self.parameters: dict[str, nn.Parameter] = {one.name: one.parameter for one in selected}
        self.peak_learning_rate: float = optimizer.learning_rate
        self.optimizers = build_optimizers(optimizer, selected, world.local)
        self._stop = False

    def _select(self) -> list[Selected]:
        """Freeze what is not trained; what the optimizer steps."""
        selected = []
        for name, parameter in self.model.named_parameters():
            group = self.method.select(name)
            parameter.requires_grad_(group is not None)
            if group is not None:
                selected.append(Selected(name, parameter, group))
        for stand_in in self.method.stand_ins:
            selected = stand_in(self.model, selected)
        return selected

    def run(self, until: int | None = None) -> bool:
        """Train to step `until` (the end when None). False when a signal asked to stop early.

        The first signal of `stopping.POLITE` ends after the current step; a second Ctrl-C or SIGTERM is Python's own.
        A request to any rank stops all of them.

        Raises:
            TrainingError: a loss or gradient is not finite. The weights are those before that step.
        """
        until = self.plan.total_steps if until is None else until
        self.model.train()
        try:
            with StopOnSignal(self.request_stop, repeated=repeated(self.world.size)):
                while self.state.step < until and not self.done and not self.world.any(self._stop):
                    started = time.perf_counter()
                    report = self.step(self.micro_batches(), started)
                    for observer in self.observers:
                        observer.after_step(self, report)
        finally:
            for observer in self.observers:
                observer.close()
        return not self.world.any(self._stop)

    def step(self, batches: Sequence[Batch], started: float | None = None) -> StepReport:
        """One optimizer step over `batches`, this rank's micro-batches.

        Where none of them, on any rank, holds anything to count for the headline, as when every weight is zero, the
        step is passed over: nothing is computed or changed, and its report has no loss.

        Args:
            batches: at least one.
            started: when building them began, if that counts.

        Raises:
            TrainingError: a loss or gradient is not finite, on any rank.
        """
        started = time.perf_counter() if started is None else started
        processor = time.process_time()
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in self.method.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        counts = self.world.sum(counts)
        if not counts[self.method.objective.headline]:
            return self._pass_over(batches, started, processor)
        done = self._accumulate(batches, counts)
        self.world.sum_gradients(self.parameters.values())
        norm = self.world.norm(self.parameters)
        norm_value = norm.item()
        self._refuse_non_finite({**done.terms, "gradient_norm": norm_value})
        figures = self.world.figures(done.arrived)
        for change in self.method.before_update:
            figures |= change(self.parameters, norm)
        self._refuse_non_finite(figures)
        rate = self._update(done.load)
        seconds = time.perf_counter() - started
        tokens = self._advance(batches, seconds)
        return StepReport(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=done.terms[self.method.objective.headline],
            terms=done.terms,
            gradient_norm=norm_value,
            learning_rate=rate,
            seconds=self.state.seconds,
            tokens_per_second=tokens / seconds,
            processor_seconds=time.process_time() - processor,
            load=done.load,
            dropped=done.dropped,
            selection_bias=self._largest_biases(),
            figures=figures,
            skipped=self.state.skipped,
        )

    def _largest_biases(self) -> dict[int, float]:
        """Of every layer that has one, wherever it lies."""
        own = {layer: bias.abs().max().item() for layer, bias in selection_biases(self.model).items()}
        if self.world.stages > 1:
            own = {layer: largest for found in self.world.everyone(own) for layer, largest in found.items()}
        return dict(sorted(own.items()))

    def micro_batches(self) -> list[Batch]:
        """This rank's share of the next step, in pieces: ranks follow each other, each with sequences in a row."""
        share = self.plan.sequences_per_step // self.world.shares
        first, size = self.state.position + self.world.share * share, self.plan.sequences_per_micro_batch
        batches = [
            self.method.data.batch(first + start, min(size, share - start)).to(self.plan.device)
            for start in range(0, share, size)
        ]
        if self.world.pieces == 1:
            return batches
        return [columns(batch, self.world.piece, self.world.pieces) for batch in batches]

    def measure(self) -> Measured:
        """What the method measures, in eval mode, without gradients and at the precision of training.

        What it draws from torch's generators is given back: a run does not depend on how often it is measured.
        """
        was_training = self.model.training
        devices = [torch.cuda.current_device()] if self.plan.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), self.autocast():
                return self.method.measure(self.world.measured(self.model))
        finally:
            self.world.settle(self.model)
            self.model.train(was_training)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of matrix products."""
        if not self.plan.bf16:
            return nullcontext()
        return torch.autocast(self.plan.device.type, dtype=torch.bfloat16)

    @property
    def done(self) -> bool:
        """Whether the run has come to its end: its last step, or the tokens that it may read."""
        most = self.plan.max_tokens
        return self.state.step >= self.plan.total_steps or (most is not None and self.state.tokens >= most)

    def progress(self) -> float:
        """Share of the run done before the next step."""
        return self.state.step / self.plan.total_steps

    def _accumulate(self, batches: Sequence[Batch], counts: Mapping[str, float]) -> _Accumulated:
        for parameter in self.parameters.values():
            parameter.grad = None
        objective = self.method.objective
        done = self.execute(objective, batches, counts, objective.weights(self.progress()), self.autocast)
        load = {layer: one.cpu() for layer, one in self.world.sum_tensors(done.load).items()}
        terms = self.world.sum({**done.terms, _DROPPED: float(done.dropped)})
        return _Accumulated(terms, load, dropped=int(terms.pop(_DROPPED)), arrived=done.arrived)

    def _pass_over(self, batches: Sequence[Batch], started: float, processor: float) -> StepReport:
        """Count a step that held nothing to learn from; its sequences are read, and not read again."""
        rate = self._learning_rate()
        first = self.state.position
        tokens = self._advance(batches, time.perf_counter() - started, skipped=1)
        said = "step %d is passed over: sequences %d to %d hold nothing to count, as all their weights are zero"
        logger.warning(said, self.state.step, first, self.state.position - 1)
        return StepReport(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=None,
            terms={},
            gradient_norm=0.0,
            learning_rate=rate,
            seconds=self.state.seconds,
            tokens_per_second=tokens / max(time.perf_counter() - started, 1e-9),
            processor_seconds=time.process_time() - processor,
            load={},
            dropped=0,
            skipped=self.state.skipped,
        )

    def _learning_rate(self) -> float:
        """Of the next step."""
        return self.peak_learning_rate * learning_rate_factor(self.schedule, self.state.step, self.plan.total_steps)

    def _update(self, load: Mapping[int, Tensor]) -> float:
        rate = self._learning_rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group[RATE_FACTOR]
            optimizer.step()
        for change in self.method.after_update:
            change(self.model, load, self.progress())
        return rate

    def _advance(self, batches: Sequence[Batch], seconds: float, skipped: int = 0) -> int:
        """Count the step; the tokens that all ranks read in it."""
        read = {
            "tokens": float(sum(batch.num_tokens for batch in batches)),
            "sequences": float(sum(batch.num_sequences for batch in batches)),
        }
        read = self.world.sum(read)
        tokens = int(read["tokens"])
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + tokens,
            position=self.state.position + int(read["sequences"]) // self.world.pieces,
            seconds=self.state.seconds + seconds,
            skipped=self.state.skipped + skipped,
            rng=_generator_states(),
        )
        return tokens

    def _refuse_non_finite(self, figures: Mapping[str, float]) -> None:
        """Raise, on all ranks the same error, if a figure is not finite on any; it names the tensors of all of them."""
        own = [name for name, value in figures.items() if not math.isfinite(value)]
        if not self.world.any(bool(own)):
            return
        found = self.world.everyone((own, self._bad_tensors()))
        bad = dict.fromkeys(name for names, _ in found for name in names)
        ranks: dict[str, list[int]] = {}
        for rank, (_, names) in enumerate(found):
            for name in names:
                ranks.setdefault(name, []).append(rank)
        tensors = sorted(ranks, key=lambda name: not name.startswith("weight"))
        first, last = self.state.position, self.state.position + self.plan.sequences_per_step - 1
        error = TrainingError(
            f"step {self.state.step + 1} is not finite: {', '.join(bad)} "
            f"(sequences {first} to {last}; first bad tensors: "
            f"{', '.join(name + self._where(ranks[name]) for name in tensors[:4]) or 'none, only the loss'}). "
            "The weights were not updated. Lower optimizer.learning_rate or raise schedule.warmup_share."
        )
        error.everywhere = self.world.size > 1
        raise error

    def _bad_tensors(self) -> list[str]:
        """Those that are not finite here; a bad weight spoils every gradient, so weights come first."""
        return [
            f"{kind} of {name}"
            for kind in ("weight", "gradient")
            for name, parameter in self.parameters.items()
            if (tensor := parameter.data if kind == "weight" else parameter.grad) is not None
            if not self.world.local(tensor).isfinite().all()
        ]

    def _where(self, ranks: Sequence[int]) -> str:
        """Of several processes, those on which a tensor, or a piece of it, is bad."""
        if self.world.size == 1:
            return ""
        return " on every rank" if len(ranks) == self.world.size else f" on {in_words(ranks)}"

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stop

    def request_stop(self) -> None:
        """End after the current step, or before it where it waits for what does not answer."""
        self._stop = True
        self.method.hurry()
