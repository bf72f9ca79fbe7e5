"""Method: the four slots that a way of training fills. The loop itself is never copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finemoe.data.batch import TokenBatch
from finemoe.training.gradients import GradientTransform
from finemoe.training.objective import Objective


@dataclass(frozen=True)
class Method:
    """Batches, objective, trainable parameters, gradient transforms."""

    batches: Callable[[int, int], TokenBatch]
    """(position, number of sequences) -> batch: a pure function, so that a position is all a resume needs."""
    objective: Objective
    trainable: Callable[[str], bool]
    """By parameter name. Experts are stacked: one expert is chosen by a gradient transform, not here."""
    transforms: tuple[GradientTransform, ...]


def everything(name: str) -> bool:
    """Train all parameters."""
    return True
