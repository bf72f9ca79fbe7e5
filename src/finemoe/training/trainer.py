"""The one trainer. Methods fill its slots; observers watch; nothing else loops over steps."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finemoe.core.errors import TrainingError
from finemoe.data.batch import TokenBatch
from finemoe.model.transformer import Transformer
from finemoe.training import balancing
from finemoe.training.balancing import BalancingConfig
from finemoe.training.losses.next_token import CROSS_ENTROPY
from finemoe.training.method import Method
from finemoe.training.optimizers import OptimizerConfig, build_optimizer
from finemoe.training.report import StepReport
from finemoe.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With weights and optimizer it is all that a bit-exact resume needs."""

    step: int = 0
    tokens: int = 0
    position: int = 0
    """Sequences the loader has given."""
    seconds: float = 0.0
    rng: Tensor = field(default_factory=torch.get_rng_state)
    """State of torch's default generator."""


@dataclass(frozen=True)
class Plan:
    """How steps are cut."""

    total_steps: int
    sequences_per_step: int
    sequences_per_micro_batch: int
    device: torch.device
    bf16: bool
    """Matrix products in bfloat16 under autocast; weights stay float32."""
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    """How selection biases move, where the model has any; resolved."""


class Observer(Protocol):
    """Told of every step, in list order."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """`trainer.state` already counts this step."""
        ...

    def close(self) -> None:
        """The run ends, well or not."""
        ...


class Trainer:
    """Counts, terms, backward, transforms, update, report (design: two paths to draw from memory)."""

    def __init__(
        self,
        model: Transformer,
        method: Method,
        optimizer: OptimizerConfig,
        schedule: Any,
        plan: Plan,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.model = model
        self.method = method
        self.plan = plan
        self.schedule = schedule
        self.observers = observers
        self.state = TrainState()
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if method.trainable(name)
        }
        self.peak_learning_rate = optimizer.learning_rate
        self.optimizer = build_optimizer(optimizer, self.parameters)
        self._stop = False

    def run(self, until: int | None = None) -> bool:
        """Train to step `until` (the end when None). False when a signal asked to stop early.

        The first Ctrl-C or SIGTERM ends after the current step; a second one is Python's own.

        Raises:
            TrainingError: a loss or gradient is not finite. The weights are those before that step.
        """
        until = self.plan.total_steps if until is None else min(until, self.plan.total_steps)
        self.model.train()
        try:
            with self._stop_on_signal():
                while self.state.step < until and not self._stop:
                    started = time.perf_counter()
                    report = self.step(self._micro_batches(), started)
                    for observer in self.observers:
                        observer.after_step(self, report)
        finally:
            for observer in self.observers:
                observer.close()
        return not self._stop

    def step(self, batches: Sequence[TokenBatch], started: float | None = None) -> StepReport:
        """One optimizer step over `batches`, its micro-batches. `started`: when building them began, if it counts."""
        started = time.perf_counter() if started is None else started
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in self.method.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        terms, load, dropped = self._accumulate(batches, counts)
        figures: dict[str, float] = {}
        for transform in self.method.transforms:
            figures |= transform(self.parameters)
        self._refuse_non_finite(terms, figures)
        rate = self._update(load)
        tokens = sum(batch.tokens.numel() for batch in batches)
        seconds = time.perf_counter() - started
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            tokens=self.state.tokens + tokens,
            position=self.state.position + sum(batch.tokens.shape[0] for batch in batches),
            seconds=self.state.seconds + seconds,
            rng=torch.get_rng_state(),
        )
        return StepReport(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=terms[CROSS_ENTROPY],
            terms=terms,
            gradient_norm=figures["gradient_norm"],
            learning_rate=rate,
            seconds=self.state.seconds,
            tokens_per_second=tokens / seconds,
            load=load,
            dropped=dropped,
            selection_bias={
                layer: bias.abs().max().item() for layer, bias in balancing.selection_biases(self.model).items()
            },
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of matrix products."""
        if not self.plan.bf16:
            return nullcontext()
        return torch.autocast(self.plan.device.type, dtype=torch.bfloat16)

    def _micro_batches(self) -> list[TokenBatch]:
        size = self.plan.sequences_per_micro_batch
        starts = range(0, self.plan.sequences_per_step, size)
        return [
            self.method.batches(self.state.position + start, min(size, self.plan.sequences_per_step - start)).to(
                self.plan.device
            )
            for start in starts
        ]

    def _accumulate(
        self, batches: Sequence[TokenBatch], counts: dict[str, float]
    ) -> tuple[dict[str, float], dict[int, Tensor], int]:
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        load: dict[int, Tensor] = {}
        dropped = 0
        weights = self.method.objective.weights(self._progress())
        for batch in batches:
            with self.autocast():
                result = self.method.objective.terms(self.model, batch)
            # A term may have nothing to count, as a look-ahead beyond every document; the cross-entropy always has.
            parts = {name: v / counts[name] for name, v in result.sums.items() if counts[name] or name == CROSS_ENTROPY}
            loss = torch.stack([part.float() * weights.get(name, 1.0) for name, part in parts.items()]).sum()
            loss.backward()
            for name, part in parts.items():
                terms[name] = terms.get(name, 0.0) + part.item()
            for layer, record in result.routing.items():
                load[layer] = load[layer] + record.load if layer in load else record.load
                dropped += int(record.dropped)
        return terms, {layer: one.cpu() for layer, one in load.items()}, dropped

    def _progress(self) -> float:
        """Share of the run done before this step."""
        return self.state.step / self.plan.total_steps

    def _update(self, load: dict[int, Tensor]) -> float:
        rate = self.peak_learning_rate * learning_rate_factor(self.schedule, self.state.step, self.plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        balancing.update(self.plan.balancing, self.model, load, self._progress())
        return rate

    def _refuse_non_finite(self, terms: dict[str, float], figures: dict[str, float]) -> None:
        bad_figures = [name for name, value in {**terms, **figures}.items() if not math.isfinite(value)]
        if not bad_figures:
            return
        tensors = [
            f"{kind} of {name}"
            for kind in ("weight", "gradient")  # a bad weight spoils every gradient: name it first
            for name, parameter in self.parameters.items()
            if (tensor := parameter.data if kind == "weight" else parameter.grad) is not None
            if not tensor.isfinite().all()
        ]
        first, last = self.state.position, self.state.position + self.plan.sequences_per_step - 1
        raise TrainingError(
            f"step {self.state.step + 1} is not finite: {', '.join(bad_figures)} (sequences {first} to {last}; "
            f"first bad tensors: {', '.join(tensors[:4]) or 'none, only the loss'}). The weights were not updated. "
            "Lower optimizer.learning_rate or raise schedule.warmup_share."
        )

    def _stop_on_signal(self) -> AbstractContextManager[None]:
        if threading.current_thread() is not threading.main_thread():
            return nullcontext()  # only the main thread may set handlers
        return _StopOnSignal(self)

    def request_stop(self) -> None:
        """End after the current step."""
        self._stop = True


class _StopOnSignal:
    """Turn the first SIGINT or SIGTERM into a stop request; give the old handlers back at once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self._trainer.request_stop()

    def _restore(self) -> None:
        while self._old:
            number, handler = self._old.popitem()
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()
