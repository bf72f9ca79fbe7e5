"""Objective: what a step minimises, as sums. The trainer divides, so no objective knows of accumulation or ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from finemoe.data.batch import TokenBatch
from finemoe.model.moe.decision import RoutingRecord
from finemoe.model.transformer import Transformer


@dataclass(frozen=True)
class Terms:
    """What one micro-batch contributes."""

    sums: Mapping[str, Tensor]
    """Differentiable scalars by name. The step's loss is the sum over names of weight · sum / count."""
    routing: Mapping[int, RoutingRecord]
    """By layer index."""


class Objective(Protocol):
    """A loss, split into denominators that need only the batch and numerators that need the model."""

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        """Denominators by name, from the batch alone; summed over the step before any backward pass."""
        ...

    def weights(self, progress: float) -> Mapping[str, float]:
        """What each term's mean is multiplied by in the loss, after `progress` of the run; 1 where it is not named."""
        ...

    def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
        """Numerators by the same names."""
        ...
