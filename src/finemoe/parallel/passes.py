"""Passes: forward and backward of the micro-batches of a step. Alone they follow each other; a pipeline mixes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from finemoe.model.moe.decision import RoutingRecord
from finemoe.model.transformer import Transformer


@dataclass(frozen=True)
class Passes:
    """What the micro-batches of a step came to here; gradients are where backward passes leave them."""

    terms: dict[str, float]
    """Mean by name, what `counts` divides: `training.objective.Terms`."""
    load: dict[int, Tensor]
    """[experts] assignments, by layer index."""
    dropped: int
    arrived: dict[int, int]
    """Rows that the experts which lie here took, by index of the layers that run here."""


class Sums(Protocol):
    """As `training.objective.Terms`."""

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Differentiable scalars by name."""
        ...

    @property
    def routing(self) -> Mapping[int, RoutingRecord]:
        """By layer index."""
        ...


class HasTerms(Protocol):
    """What is asked of a `training.objective.Objective` once counts and weights are known."""

    def terms(self, model: Any, batch: Any) -> Sums:
        """Numerators by name."""
        ...


class Execute(Protocol):
    """Runs forward and backward passes of all micro-batches of a step, and adds to the gradients that there are."""

    def __call__(
        self,
        objective: HasTerms,
        batches: Sequence[Any],
        counts: Mapping[str, float],
        weights: Mapping[str, float],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Passes:
        """Run them.

        Args:
            objective: what is minimised.
            batches: this rank's, at least one.
            counts: denominators of the whole step, over all ranks, by name.
            weights: of the terms in the loss, 1 where a name is missing.
            autocast: the precision of forward passes.
        """
        ...


def step_loss(
    sums: Mapping[str, Tensor], counts: Mapping[str, float], weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What one micro-batch adds to the loss of its step, and by name before it is weighed.

    A term may have nothing to count, as a look-ahead beyond every document: it is left out.
    """
    parts = {name: value / counts[name] for name, value in sums.items() if counts[name]}
    return torch.stack([part.float() * weights.get(name, 1.0) for name, part in parts.items()]).sum(), parts


@final
@dataclass(frozen=True)
class OneAfterAnother:
    """Each micro-batch forward and backward before the next."""

    model: Transformer

    def __call__(
        self,
        objective: HasTerms,
        batches: Sequence[Any],
        counts: Mapping[str, float],
        weights: Mapping[str, float],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Passes:
        """As in `Execute`."""
        terms: dict[str, float] = {}
        load: dict[int, Tensor] = {}
        arrived: dict[int, int] = {}
        dropped = torch.zeros((), dtype=torch.int64)
        for batch in batches:
            with autocast():
                result = objective.terms(self.model, batch)
            loss, parts = step_loss(result.sums, counts, weights)
            loss.backward()
            for name, part in parts.items():
                terms[name] = terms.get(name, 0.0) + part.item()
            for layer, record in result.routing.items():
                load[layer] = load[layer] + record.load if layer in load else record.load
                arrived[layer] = arrived.get(layer, 0) + (record.arrived or 0)
                dropped = dropped.to(record.dropped.device) + record.dropped  # read once: reading makes a GPU wait
        return Passes(terms, load, int(dropped), arrived)
