"""Setting: what a run tells the method that it trains with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finemoe.core.config import Config
from finemoe.data import DataConfig
from finemoe.model.config import ModelConfig
from finemoe.training.balancing import BalancingConfig
from finemoe.training.losses.next_token import MTPLossConfig


class MethodConfig(Config):
    """Base of the [method] table of every method."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Of other tables of a recipe, where it says nothing of them."""
    moves_biases: ClassVar[bool] = False
    """Selection biases move where the recipe says nothing of them."""


class TrainableConfig(Config):
    """Base of the [trainable] table of every choice of what may move."""

    @property
    def moves_routers(self) -> bool:
        """Whether routers are trained: where they are not, their biases stay as they are too."""
        return True

    @property
    def reads_before(self) -> int:
        """Positions of the data that are read before the first step, beside those that the run reads."""
        return 0


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
    positions: int | None
    """Of the data that the whole run reads; None where that is not known before the data is."""
    max_gradient_norm: float
    balancing: BalancingConfig
    """With a rate, also where no router of the model has a bias that it would move."""
    mtp: MTPLossConfig
    """Of effect only where the model has modules for it."""
