"""One stage of a pipeline as torch's schedules run it, and the model that an objective sees there.

Only the hidden state travels, flat and padded to the longest micro-batch. Every stage runs the objective up to the
point where it calls the model, and so learns of positions and documents as the last one does; there the objective goes
on with the state that arrived, and knows of no stages. Balance losses are added where they arise: the state that leaves
a stage takes their gradient back into the stage's own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finemoe.core.errors import ConfigError
from finemoe.model.backend import Backend
from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingRecord
from finemoe.model.transformer import ModelOutput, Transformer
from finemoe.parallel.passes import HasTerms, step_loss
from finemoe.parallel.stages import Stage, modules_of


@dataclass(frozen=True)
class Step:
    """What the passes of a step need, and what they leave behind."""

    objective: HasTerms
    batches: Sequence[Any]
    counts: Mapping[str, float]
    weights: Mapping[str, float]
    autocast: Callable[[], AbstractContextManager[Any]]
    length: int
    """[tokens] Of the longest micro-batch."""
    parts: dict[int, list[Mapping[str, Tensor]]] = field(default_factory=dict)
    """By stage: the terms of each micro-batch."""
    routing: list[Mapping[int, RoutingRecord]] = field(default_factory=list)

    def keep(self, stage: Stage, parts: Mapping[str, Tensor], routing: Mapping[int, RoutingRecord]) -> None:
        """For the report, without graphs: these are the schedule's."""
        self.parts.setdefault(stage.index, []).append({name: part.detach() for name, part in parts.items()})
        self.routing.append({n: _kept(one) for n, one in routing.items()})


def _kept(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord(record.load, record.dropped, {}, None, arrived=record.arrived)


class StageDone(Exception):
    """The model was called on a stage before the last: what came out of the stage."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output


@final
class StageView:
    """What an objective may ask a model for, on one stage. Calling it ends a stage before the last by `StageDone`."""

    def __init__(self, model: Transformer, stage: Stage, arrived: Tensor | None) -> None:
        self._model = model
        self._stage = stage
        self._arrived = arrived
        self._called = False

    def __getattr__(self, name: str) -> NoReturn:
        raise ConfigError(f"the objective asks for model.{name}, which a stage of a pipeline does not have")

    @property
    def training(self) -> bool:
        """As the model."""
        return self._model.training

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""
        return self._model.config

    @property
    def backend(self) -> Backend:
        """As the model's."""
        return self._model.backend

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]; on the last stage alone."""
        return self._model.head_weight

    def __call__(self, tokens: Tensor, *, mtp: bool = False, **settings: Any) -> ModelOutput:
        """`Transformer.forward` from the state that arrived.

        Raises:
            StageDone: on every stage but the last.
            ConfigError: it was called before, or with what a stage cannot do.
        """
        if self._called:
            raise ConfigError("the objective runs the model more than once on a batch: a pipeline runs it once")
        self._called = True
        for name in ("cache", "groups", "states", "start", "stop"):
            if settings.pop(name, None):
                raise ConfigError(f"the objective runs the model with {name}, which a pipeline cannot do")
        stage, start = self._stage, None
        if self._arrived is not None:
            start = (stage.first, self._arrived[: tokens.numel()].view(*tokens.shape, -1))
        if stage.is_last:
            output: ModelOutput = self._model(tokens, mtp=mtp, start=start, **settings)
            return output
        raise StageDone(self._model(tokens, start=start, stop=stage.stop, **settings))

    def refuse_uncalled(self) -> None:
        """Raises ConfigError where the model was not called at all: other stages wait for its gradient."""
        if not self._called:
            raise ConfigError("the objective did not run the model on a batch, and a pipeline cannot pass it over")


@final
class StageModule(nn.Module):
    """Micro-batches by number, states `[length, hidden]` in and out, and a loss at the end."""

    def __init__(self, model: Transformer, stage: Stage, shares_embedding: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(modules_of(model, stage, shares_embedding))
        self.stage = stage
        self._model = (model,)  # no child of this module: the model has parts of other stages
        self.step: Step | None = None

    def forward(self, arrived: Tensor, *, index: Tensor) -> Tensor:
        """`arrived`: the states, or at the first stage the number once more. The next states, or the loss."""
        step = self.step
        assert step is not None
        view = StageView(self._model[0], self.stage, None if self.stage.is_first else arrived)
        try:
            with step.autocast():
                result = step.objective.terms(view, step.batches[int(index)])
        except StageDone as done:
            return self._leaving(step, done.output)
        view.refuse_uncalled()
        loss, parts = step_loss(result.sums, step.counts, step.weights)
        step.keep(self.stage, parts, result.routing)
        return loss

    def _leaving(self, step: Step, output: ModelOutput) -> Tensor:
        """The states that travel on, and with them the way back to this stage's balance losses."""
        sums: dict[str, Tensor] = {}
        for record in output.routing.values():
            for name, value in record.balance.items():
                if step.counts.get(name):  # else no term of this objective
                    sums[name] = sums[name] + value if name in sums else value
        loss, parts = step_loss(sums, step.counts, step.weights) if sums else (None, {})
        step.keep(self.stage, parts, output.routing)
        states = output.hidden.flatten(0, 1)
        states = F.pad(states, (0, 0, 0, step.length - len(states)))
        leaving: Tensor = _WithLoss.apply(states, loss)
        return leaving


class _WithLoss(torch.autograd.Function):
    """The states; backward, their gradient as it is and a gradient of 1 for the loss."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor | None) -> Tensor:
        ctx.like = None if loss is None else torch.ones_like(loss)
        return states.clone()  # torch detaches in place what a stage returns, which a view forbids

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None]:
        return gradients[0], ctx.like
