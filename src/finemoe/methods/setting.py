"""Setting: what a run tells the method that it trains with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from finemoe.core.config import Config
from finemoe.data import DataConfig
from finemoe.model.config import ModelConfig
from finemoe.training.balancing import BalancingConfig
from finemoe.training.losses.next_token import MTPLossConfig


@dataclass(frozen=True)
class Kept:
    """Tensors that a run holds beside its model, with their gradients and optimizer state."""

    what: str
    """In words that follow "and"."""
    nbytes: int
    lower: str
    """What to change in the recipe where there is no room for them."""


@dataclass(frozen=True)
class Held:
    """What follows from what may move: memory of a run, in float32."""

    stepped: int
    """[numbers] That the optimizer steps; each has a gradient, and its state."""
    passing: int = 0
    """[numbers] Of the largest gradient that is there for a moment only, until what stands in has taken it."""
    kept: tuple[Kept, ...] = ()
    """As long as the run goes."""
    before: tuple[Kept, ...] = ()
    """Before the first step, when there are neither gradients of all that moves nor optimizer state."""
    sequences_before: int = 0
    """[sequences] That go through the model at once in that time, forward and backward."""


class MethodConfig(Config):
    """Base of the [method] table of every method."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Of other tables of a recipe, where it says nothing of them."""
    moves_biases: ClassVar[bool] = False
    """Selection biases move where the recipe says nothing of them."""

    @property
    def prepares(self) -> bool:
        """Whether it looks at the whole model before the first step, which every process then holds for a moment."""
        return False

    def moves(self, name: str) -> bool:
        """Whether the parameter of that name is trained, if the choice of what may move lets it."""
        return True

    @property
    def together(self) -> int:
        """[sequences] Of which a step must hold a multiple."""
        return 1

    def refuse(self, sequences: int, length: int) -> None:
        """Refuse steps of so many sequences, each of `length` tokens at most, that it cannot learn from.

        Raises:
            ValueError: naming the keys, and values that work.
        """

    def as_learnt(self) -> MethodConfig:
        """Itself without what a run may go on with otherwise, such as where a server listens."""
        return self

    def kept(self, weights: int) -> tuple[Kept, ...]:
        """What is held beside the model, whose `weights` take so many bytes, as long as the run goes.

        Raises:
            CheckpointError, ConfigError: they hold no model.
        """
        return ()

    @property
    def before(self) -> tuple[Kept, ...]:
        """What is held, and let go, before the run's own model is there.

        Raises:
            CheckpointError, ConfigError: as `kept`.
        """
        return ()


class TrainableConfig(Config):
    """Base of the [trainable] table of every choice of what may move."""

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """What a run takes because of what moves.

        Args:
            shapes: of the parameters that the method would train, by name.
            setting: of the run.

        Raises:
            ConfigError: as building it would.
        """
        return Held(numbers(shapes))

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
    directory: Path | None = None
    """Of the run, where there is one: a look at its data or its speed has none."""


def no_room(answer: int, length: int) -> str:
    """What is said of answers that leave no room for a prompt before them."""
    return f"method.answer_tokens {answer} leaves no room for a prompt in data.sequence_length {length}: lower it"


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes.values())
