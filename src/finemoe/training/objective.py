"""Objective: what a step minimises, as sums. The trainer divides, so no objective knows of accumulation or ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from finemoe.data.batch import Batch
from finemoe.model.moe.balance import BALANCE_TERMS
from finemoe.model.moe.decision import RoutingRecord
from finemoe.model.transformer import Transformer

BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)


@dataclass(frozen=True)
class Terms:
    """What one micro-batch contributes."""

    sums: Mapping[str, Tensor]
    """Differentiable scalars by name. The step's loss is the sum over names of weight · sum / count."""
    routing: Mapping[int, RoutingRecord]
    """By layer index."""


class Objective(Protocol[BatchT_contra]):
    """A loss, split into denominators that need only the batch and numerators that need the model."""

    @property
    def headline(self) -> str:
        """The term that reports call the loss; a step that has nothing to count for it is passed over."""
        ...

    def counts(self, batch: BatchT_contra) -> dict[str, float]:
        """Denominators by name, from the batch alone; summed over the step and all ranks before any backward pass.

        A term that comes to 0 is left out of the step.
        """
        ...

    def weights(self, progress: float) -> Mapping[str, float]:
        """What each term's mean is multiplied by in the loss, after `progress` of the run; 1 where it is not named.

        A term of weight 0 is a figure that is reported and not minimised.
        """
        ...

    def terms(self, model: Transformer, batch: BatchT_contra) -> Terms:
        """Numerators by the same names.

        Remembers nothing: the step may yet be refused, and what a method counts or averages belongs in its
        `before_update` and `after_update`.
        """
        ...


def balance_counts(num_sequences: int) -> dict[str, float]:
    """Denominators of `balance_sums`: each term is a sum over sequences."""
    return dict.fromkeys(BALANCE_TERMS, float(num_sequences))


def balance_sums(routing: Mapping[int, RoutingRecord]) -> dict[str, Tensor]:
    """The balance terms of all layers added up by name, in their order: what most objectives add to their own."""
    sums: dict[str, Tensor] = {}
    for record in routing.values():
        for name, value in record.balance.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums
