"""Learning-rate schedules: a factor of the peak for each step. A new one is a config, a function and a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from finemoe.core.config import Config, union_of

Share = Annotated[float, Field(ge=0, le=1)]


class MultiStepConfig(Config):
    """Linear warm-up, constant, then a factor at each milestone: DeepSeek's schedule up to V2."""

    kind: Literal["multi_step"] = "multi_step"
    warmup_share: Share = 0.05
    """[share] Share of all steps spent rising from 0 to the peak."""
    milestones: tuple[Share, ...] = (0.8, 0.9)
    """[share] Of all steps, after each of which the rate is multiplied by `factor`."""
    factor: PositiveFloat = 0.316
    """[factor] Of the learning rate at each milestone; 0.316 twice is a tenth."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones {self.milestones} must rise")
        return self


class CosineConfig(Config):
    """Linear warm-up, then half a cosine down to `final_share` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_share: Share = 0.05
    """[share] Of all steps spent rising from 0 to the peak."""
    final_share: Share = 0.1
    """[share] Of the peak that is left at the end."""


class WarmupStableDecayConfig(Config):
    """Linear warm-up, constant, then a straight line down to `final_share` of the peak."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_share: Share = 0.05
    """[share] Of all steps spent rising from 0 to the peak."""
    decay_share: Share = 0.2
    """[share] Of all steps spent falling, at the end."""
    final_share: Share = 0.0
    """[share] Of the peak that is left at the end."""


class ConstantConfig(Config):
    """The same rate throughout, after a warm-up where one is asked for: how chat models of the family are tuned."""

    kind: Literal["constant"] = "constant"
    warmup_share: Share = 0.0
    """[share] Of all steps spent rising from 0 to the rate."""


def _multi_step(config: MultiStepConfig, done: float) -> float:
    # A milestone at 0.8 of 10 steps is step 8, whatever 8 / 10 rounds to.
    return config.factor ** sum(done >= milestone - 1e-9 for milestone in config.milestones)


def _cosine(config: CosineConfig, done: float) -> float:
    falling = max(0.0, done - config.warmup_share) / max(1 - config.warmup_share, 1e-9)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * min(falling, 1.0)))


def _warmup_stable_decay(config: WarmupStableDecayConfig, done: float) -> float:
    left = (1 - done) / max(config.decay_share, 1e-9)
    return config.final_share + (1 - config.final_share) * min(left, 1.0)


def _constant(config: ConstantConfig, done: float) -> float:
    return 1.0


SCHEDULES: dict[str, tuple[type[Config], Callable[[Any, float], float]]] = {
    "multi_step": (MultiStepConfig, _multi_step),
    "cosine": (CosineConfig, _cosine),
    "constant": (ConstantConfig, _constant),
    "warmup_stable_decay": (WarmupStableDecayConfig, _warmup_stable_decay),
}
ScheduleConfig: Any = union_of(config for config, _ in SCHEDULES.values())


def learning_rate_factor(config: Any, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for `step` (from 0) of `total_steps`; step 0 already moves."""
    warmup = config.warmup_share * total_steps
    rising = min(1.0, (step + 1) / warmup) if warmup >= 1 else 1.0
    return rising * SCHEDULES[config.kind][1](config, step / total_steps)
