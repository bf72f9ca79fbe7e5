"""CompareConfig: everything a comparison is made of, and how a recipe becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finemoe.core.config import Config, parse
from finemoe.core.errors import ConfigError
from finemoe.data import DataConfig
from finemoe.data.config import NEW_SPLITTING
from finemoe.model.config import ModelRecipe
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.presets import resolve
from finemoe.runs.config import DEFAULT_LEARNING_RATE, TrainingConfig, with_defaults
from finemoe.studies.arms import MatchingConfig, RoutingConfig
from finemoe.training.optimizers import AdamWConfig, OptimizerConfig
from finemoe.training.schedule import MultiStepConfig, ScheduleConfig

_TOKENS_PER_STEP = 4096  # short runs of small models gain more from steps than from large batches


class BudgetConfig(Config):
    """What every arm gets the same of."""

    kind: Literal["tokens", "flops", "seconds"] = "tokens"
    """What every run gets the same amount of."""
    value: PositiveFloat = 2_000_000
    """[tokens, FLOPs or seconds] Tokens, training FLOPs, or seconds of training on this machine, for each run."""


class TuningConfig(Config):
    """The same learning-rate search for every arm, on a seed of its own, before the comparison."""

    learning_rates: tuple[PositiveFloat, ...]
    """[per step] The rates to try, each in a short run of every arm."""
    tokens: PositiveInt
    """[tokens] Length of each trial run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.learning_rates or len(set(self.learning_rates)) != len(self.learning_rates):
            raise ValueError(f"learning_rates must be a list of different rates, not {list(self.learning_rates)}")
        return self


class CompareConfig(Config):
    """A comparison. Every field has a default: `finemoe compare` runs as it is."""

    name: str = "compare"
    """What the comparison is called: its folder, where no --out is given, is runs/NAME-DATE."""
    title: str = "DeepSeekMoE and its baselines at matched compute"
    """Of the report."""
    arms: tuple[str, ...] = ("dense", "hash", "switch", "gshard", "deepseek-moe")
    """What to compare: built-in arms, presets, or recipes that hold a [model] and nothing else."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Each arm is trained once with each; three or more give intervals that can decide."""
    base: ModelRecipe
    """A dense model, as [model] of a run; its feed-forward layer is the standard FFN that the arms are sized from."""
    matching: MatchingConfig = MatchingConfig()
    """What matched means."""
    routing: RoutingConfig = RoutingConfig()
    """What all learned routers share."""
    budget: BudgetConfig = BudgetConfig()
    """How long each run is."""
    data: DataConfig = DataConfig()
    """What to learn from, as in a run."""
    training: TrainingConfig = TrainingConfig(steps=1)
    """As in a run's recipe, without its length, which is the budget's; tokens_per_step is 4096 if nothing is said."""
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=DEFAULT_LEARNING_RATE)
    """What turns gradients into steps, as in a run."""
    learning_rates: Mapping[str, PositiveFloat] = {}
    """[per step] By arm, where it differs from optimizer.learning_rate."""
    tuning: TuningConfig | None = None
    """A search for each arm's learning rate before the comparison."""
    schedule: ScheduleConfig = MultiStepConfig()
    """How the learning rate rises and falls, as in a run."""
    parallel_runs: NonNegativeInt = 0
    """[runs] Runs at the same time, each with an equal share of the threads. 0: one a core."""
    prompt: str | tuple[str, ...] = "def "
    """What every arm completes in the report; one text, or several."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every text to complete."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.base.feed_forward, DenseConfig):
            raise ValueError("base.feed_forward must be dense: it is the standard FFN that all arms are sized from")
        for field in ("arms", "seeds"):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{field} must be a list of different entries, not {list(values)}")
        unknown = sorted(set(self.learning_rates) - set(self.arms))
        if unknown:
            raise ValueError(f"learning_rates names {unknown[0]!r}, which is not among the arms {list(self.arms)}")
        if self.tuning is not None and self.learning_rates:
            raise ValueError("learning_rates and tuning exclude each other: tuning chooses the rates")
        per_step = self.training.tokens_per_step
        for field, tokens in (
            ("budget.value", self.budget.value if self.budget.kind == "tokens" else per_step),
            ("tuning.tokens", self.tuning.tokens if self.tuning is not None else per_step),
        ):
            if tokens < per_step:
                raise ValueError(f"{field} {tokens:g} is less than one step of {per_step} tokens: raise it")
        return self


def resolve_comparison(raw: Mapping[str, Any], source: str) -> CompareConfig:
    """A recipe's tables to a CompareConfig; `base` may start from a dense preset, by default tiny-dense.

    Raises:
        ConfigError: unknown keys, impossible values.
    """
    if "model" in raw:
        raise ConfigError(f"{source} is the recipe of one run: use `finemoe train`, or name it among the `arms`")
    for table in ("training", "data", "base"):
        if not isinstance(raw.get(table, {}), Mapping):
            raise ConfigError(f"{source}: `{table}` must be a table (got {raw[table]!r})")
    raw = with_defaults(raw)
    training = raw.get("training", {})
    for field in ("tokens", "steps", "max_tokens"):
        if field in training or field in raw:
            place = f"training.{field}" if field in training else field
            raise ConfigError(f"{source}: {place}: a comparison's length is [budget] kind and value")
    base = raw.get("base", {})
    if "preset" not in base and "feed_forward" not in base:  # nothing, or a few keys that differ from the default
        base = {"preset": "tiny-dense", **base}
    base = resolve(base, f"{source}: base")
    data = {"vocab_size": base.vocab_size, "splitting": NEW_SPLITTING, **raw.get("data", {})}
    filled = {
        **raw,
        "base": base.model_dump(),
        "data": data,
        "training": {"tokens_per_step": _TOKENS_PER_STEP, **training, "steps": 1},
    }
    return parse(CompareConfig, filled, source)
