"""The run that a plan is of: a recipe's, resolved as the trainer does it; of a model alone, one that is made up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.core.config import read_tables, with_overrides
from finemoe.core.errors import ConfigError
from finemoe.model.backends import all_native
from finemoe.model.config import ModelConfig
from finemoe.parallel.config import Layout, Start
from finemoe.parallel.planner.devices import Precision
from finemoe.parallel.planner.setup import Setup, When, at_once
from finemoe.runs.config import RunConfig, read_recipe, resolve_run
from finemoe.runs.footprint import VALIDATION_TOKENS
from finemoe.runs.planning.sizing import Described, describe
from finemoe.runs.planning.stages import NOWHERE, chosen_stage, configurations, stages_of
from finemoe.runs.start import layout_of, refuse_layout

SEQUENCES_A_DEVICE = 8
"""Micro-batches of a device in a step, of a model that no recipe says anything of."""
_KEYS = {
    "parallel": None,
    "training": {"tokens_per_step", "micro_batch_tokens"},
    "data": {"sequence_length"},
    "kernels": {"recompute"},
    "optimizer": {"moments"},
}


@dataclass(frozen=True)
class Options:
    """What the options of a plan ask for; None: as the recipe says, or its defaults."""

    tokens_per_step: int | None = None
    micro_batch: int | None = None
    seq_len: int | None = None
    tokens: float | None = None
    recompute: bool | None = None
    precision: Precision | None = None
    gather: When = "micro_batch"

    @property
    def overrides(self) -> list[str]:
        """Those that a recipe has a key for, but the micro-batch, which is in sequences here."""
        asked = {
            "data.sequence_length": self.seq_len,
            "training.tokens_per_step": self.tokens_per_step,
            "kernels.recompute": None if self.recompute is None else str(self.recompute).lower(),
        }
        return [f"{key}={value}" for key, value in asked.items() if value is not None]


@dataclass(frozen=True)
class Question:
    """A run to be planned."""

    name: str
    config: RunConfig
    """As the trainer would have it."""
    options: Options
    tokens: float | None
    """Of the whole run."""
    stage: str | None = None
    """Which of a recipe's stages, in a sentence that names them all."""

    def setup(self, layout: Layout, here: bool = False) -> Setup:
        """The question for the planner, with the micro-batches that the trainer would make.

        Args:
            layout: of the run.
            here: on this machine, whose kernels are known.

        Raises:
            ConfigError: the planner knows no such run.
        """
        sequences, most = self.config.sequences_per_step, self.config.micro_batch_sequences
        return Setup.of(
            layout,
            sequences=sequences,
            seq_len=self.config.data.sequence_length,
            micro_batch=at_once(sequences, layout.data, most),
            precision=self._precision,
            recompute=self.config.kernels.recompute,
            gather=self.options.gather,
            reduce=self.options.gather,
            state_bytes=self.config.optimizer.state_bytes,
            native=here and self._natively(),
            validated=min(VALIDATION_TOKENS, self.config.data.max_validation_tokens) if here else 0,
        )

    def layout(self, processes: int, start: Start = "plan") -> Layout:
        """Of so many processes.

        Raises:
            ConfigError: as `ParallelConfig.layout`.
        """
        return layout_of(self.config, processes, start)

    def refuse(self, layout: Layout) -> None:
        """What the trainer says to a layout that it does not train by.

        Raises:
            ConfigError: in its own words, but for keys that a plan has options for, which win over them.
        """
        try:
            refuse_layout(self.config, layout)
        except ConfigError as error:
            length = self.config.data.sequence_length
            said = str(error).replace("--set training.tokens_per_step=", "--tokens-per-step ")
            said = re.sub(
                r"--set training\.micro_batch_tokens=(\d+)", lambda one: f"--micro-batch {int(one[1]) // length}", said
            )
            raise ConfigError(said) from error

    def _natively(self) -> bool:
        """Whether the trainer would take our kernels for a CPU, as far as one can say before it measures them."""
        return self._precision == "fp32" and all_native(self.config.kernels)

    @property
    def _precision(self) -> Precision:
        return self.options.precision or ("fp32" if self.config.training.precision == "fp32" else "bf16")


def question(
    model: str | os.PathLike[str] | ModelConfig,
    processes: int,
    overrides: Sequence[str],
    options: Options,
    stage: str | None = None,
) -> Question:
    """What is to be planned.

    Args:
        model: what `finemoe.size` takes. A recipe, or a run, is resolved as `finemoe train` would; any other model is
            given 8 micro-batches a process, of one sequence each.
        processes: that will train it.
        overrides: `a.b=c`; of a recipe any key, else of `[parallel]`, batch, length, recomputation and the
            moments' precision.
        options: win over both.
        stage: of a recipe with stages, whose model may be yet to be trained; None: the first that trains.

    Raises:
        ConfigError: no such model, stage or key, or no run that could be.
    """
    tables = _tables(model)
    if "stage" in tables:
        return _of_stage(tables, os.fspath(model), stage, overrides, options)  # type: ignore[arg-type]
    if stage is not None:
        raise ConfigError(f"--stage {stage}: {model} has no stages; leave it out")
    described = describe(model, options.seq_len)
    name = "model" if isinstance(model, ModelConfig) else os.fspath(model)
    if described.recipe:
        raw = _with_length(
            {key: value for key, value in described.recipe.items() if key not in ("stage", "study")}, overrides
        )
    else:
        raw = _made_up(described, processes, overrides, options)
    raw, _ = read_recipe(raw, [*overrides, *options.overrides])
    config = resolve_run(raw, name)
    return Question(
        name, _cut(config, options), options, options.tokens or _length(described.recipe, overrides, config)
    )


def _tables(model: str | os.PathLike[str] | ModelConfig) -> Mapping[str, Any]:
    """Of a recipe; none of anything else."""
    if isinstance(model, ModelConfig) or Path(model).suffix not in (".toml", ".json"):
        return {}
    return read_tables(model)


def _of_stage(
    tables: Mapping[str, Any], source: str, name: str | None, overrides: Sequence[str], options: Options
) -> Question:
    """One stage, as it will be when those before it have been trained."""
    chosen, _ = chosen_stage(stages_of(tables, source, NOWHERE, overrides), name, source)
    own = [f"stage.{chosen.name}.{one}" for one in options.overrides]
    stages = stages_of(tables, source, NOWHERE, [*overrides, *own])
    stage, said = chosen_stage(stages, chosen.name, source)
    config = _cut(configurations(stages, source)[stage.name], options)
    tokens = options.tokens or _length(stage.raw, (), config)
    return Question(f"{source}, stage {stage.name}", config, options, tokens, said)


def _cut(config: RunConfig, options: Options) -> RunConfig:
    """`config` with the micro-batch of the options."""
    if options.micro_batch is None:
        return config
    tokens = options.micro_batch * config.data.sequence_length
    training = config.training.model_copy(update={"micro_batch_tokens": tokens})
    return config.model_copy(update={"training": training})


def _with_length(recipe: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    """A recipe that says no length has one of a step, which no figure of a step depends on."""
    if not isinstance(recipe.get("training", {}), Mapping) or any(_lengths(recipe, overrides)):
        return recipe
    return {**recipe, "training": {**recipe.get("training", {}), "steps": 1}}


def _lengths(recipe: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """Keys that say how long the run is."""
    for tables in (recipe, with_overrides({}, overrides)):
        training = tables.get("training", {})
        if isinstance(training, Mapping):
            yield from {"tokens", "steps", "epochs"} & training.keys()


def _length(recipe: Mapping[str, Any], overrides: Sequence[str], config: RunConfig) -> float | None:
    """[tokens] Of the run, where it says so."""
    training = config.training
    if training.epochs is not None or not any(_lengths(recipe, overrides)):
        return None
    return training.tokens or training.total_tokens


def _made_up(described: Described, processes: int, overrides: Sequence[str], options: Options) -> dict[str, Any]:
    """A run of a model that nothing says how to train."""
    over = with_overrides({}, overrides)
    _require_known(over)
    length = options.seq_len or over.get("data", {}).get("sequence_length") or described.seq_len
    asked = over.get("training", {})
    micro = options.micro_batch or max(1, (asked.get("micro_batch_tokens") or length) // length)
    return {
        "model": described.config.model_dump(),
        # Whose tokenizer does not matter here, and no size of one is refused.
        "data": {"sequence_length": length, "tokenizer": "of the model", "vocab_size": 2048},
        "training": {
            "steps": 1,
            "micro_batch_tokens": micro * length,
            "tokens_per_step": SEQUENCES_A_DEVICE * micro * processes * length,
        },
    }


def _require_known(over: Mapping[str, Any]) -> None:
    for table, value in over.items():
        keys = _KEYS.get(table, set())
        if keys is not None and (not isinstance(value, Mapping) or set(value) - keys):
            known = ", ".join(f"{name}.{key}" for name, inner in _KEYS.items() for key in sorted(inner or {"*"}))
            raise ConfigError(f"--set {table}: a plan takes {known}; write all else into a recipe, and plan that")
        if keys is None and not isinstance(value, Mapping):
            raise ConfigError(f"--set {table}: write it as {table}.expert=64")
