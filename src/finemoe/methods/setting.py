"""Setting: what a run tells the method that it trains with."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.data import DataConfig
from finemoe.model.config import ModelConfig
from finemoe.training.balancing import BalancingConfig
from finemoe.training.losses.next_token import MTPLossConfig


@dataclass(frozen=True)
class Setting:
    """The parts of a run's configuration that a method builds on, resolved."""

    model: ModelConfig
    data: DataConfig
    start_from: str | None
    """What the run began with, where it was opened: a reference can be opened again from there."""
    seed: int
    """Of the run; a method derives streams of its own from it (`core.seeds.derive`)."""
    sequences_per_step: int
    max_gradient_norm: float
    balancing: BalancingConfig
    """With a rate, also where no router of the model has a bias that it would move."""
    mtp: MTPLossConfig
    """Of effect only where the model has modules for it."""
