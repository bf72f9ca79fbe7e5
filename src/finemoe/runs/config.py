"""RunConfig: everything one training run is made of, and how a recipe becomes one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from finemoe.checkpoint.open import read_model_config, text_home
from finemoe.checkpoint.own_config import refuse_older
from finemoe.core.config import Config, in_words, merge, parse, read_tables, with_overrides
from finemoe.core.errors import ConfigError
from finemoe.core.reading import read_object
from finemoe.data import DataConfig
from finemoe.data.config import NEW_SPLITTING
from finemoe.methods import METHODS, MethodConfig, TrainableConfig
from finemoe.methods.pretraining import PretrainingConfig
from finemoe.methods.setting import Setting
from finemoe.methods.trainables.everything import EverythingConfig
from finemoe.model.config import Kernels, ModelConfig, can_begin_with, expand, with_balance, without_capacity
from finemoe.model.moe.balance import BalanceConfig
from finemoe.model.presets import resolve
from finemoe.parallel.config import ParallelConfig
from finemoe.runs.trackers import TrackerName
from finemoe.training.balancing import BalancingConfig, has_selection_bias
from finemoe.training.losses.next_token import MTPLossConfig
from finemoe.training.optimizers import AdamWConfig, OptimizerConfig
from finemoe.training.schedule import MultiStepConfig, ScheduleConfig

DEFAULT_LEARNING_RATE = 4e-3
"""Best of the tuning in docs/log.md for models of hidden size 64; larger ones want less (papers: 1.08e-3 at 1280)."""

_LENGTHS = {"tokens", "steps", "epochs"}
"""Keys of [training] of which one is given."""

MOST_STEPS_UNSAVED = 500
"""Between checkpoints, where a recipe does not say."""


class TrainingConfig(Config):
    """How long, in what pieces, where."""

    tokens: PositiveInt | None = None
    """[tokens] Length of the run in tokens; give this, `steps` or `epochs`."""
    steps: PositiveInt | None = None
    """[steps] Length of the run in optimizer steps; give this, `tokens` or `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """[epochs] Length of the run in passes over the data; `steps` takes its place as soon as the data is read."""
    max_tokens: PositiveInt | None = None
    """[tokens] The run ends with the step by which it has read so many, even if `steps` are not done: for equal compute
    where steps differ in length, as those of GRPO do. Schedules count steps: this wants one that is constant."""
    tokens_per_step: PositiveInt = 8192
    """[tokens] Batch of one optimizer step; a multiple of the sequence length."""
    micro_batch_tokens: PositiveInt | None = None
    """[tokens] Tokens in memory at once; the step is accumulated from such pieces. None: up to 16,384."""
    evaluate_every: PositiveInt | None = None
    """[steps] Steps between validations. None: ten over the run."""
    checkpoint_every: PositiveInt | None = None
    """[steps] Steps between checkpoints; one is always written at the end and on Ctrl-C. None: four over the run, and
    never more than 500 steps apart."""
    checkpoint_minutes: NonNegativeFloat = 10.0
    """[minutes] Longest time without a checkpoint, however long a step takes; 0: steps alone decide. It changes no
    result."""
    keep_checkpoints: PositiveInt = 3
    """[checkpoints] The newest ones; older ones are deleted."""
    checkpoint_format: Literal["whole", "sharded"] = "whole"
    """whole: the first process writes tensors in one file. sharded: each process writes what it holds, for models that
    no process can hold; everything opens both, and a run goes on with either."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute. auto: CUDA, else MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 products on CUDA, float32 elsewhere (bf16 is slower than float32 on most CPUs)."""
    threads: NonNegativeInt = 0
    """[threads] CPU threads; 0: all cores."""
    memory_check: bool = True
    """Refuse to start what is estimated to need more memory than is available; false goes on regardless."""
    trackers: tuple[TrackerName, ...] = ()
    """Mirrors of metrics.jsonl; each needs its package from the [track] extra."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(length is not None for length in (self.tokens, self.steps, self.epochs)) != 1:
            raise ValueError("give exactly one of `tokens`, `steps` and `epochs`: it is the length of the run")
        if self.tokens is not None and self.max_tokens is not None:
            raise ValueError(
                f"`tokens` {self.tokens} and `max_tokens` {self.max_tokens} exclude each other: `tokens` stands for "
                "steps of tokens_per_step each; give `steps` or `epochs` beside `max_tokens`, or leave `max_tokens` out"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run.

        Raises:
            ConfigError: it is given in epochs, and the data has not been read.
        """
        if self.epochs is not None:
            raise ConfigError("training.epochs: how many steps that is depends on the data; give training.steps here")
        return self.steps if self.steps is not None else (self.tokens or 0) // self.tokens_per_step

    @property
    def total_tokens(self) -> int:
        """Tokens of the run where every step is full; at most `max_tokens`, behind which no step begins.

        Raises:
            ConfigError: as of `total_steps`.
        """
        tokens = self.total_steps * self.tokens_per_step
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    @property
    def steps_between_checkpoints(self) -> int:
        """As given; else a quarter of the run, at most `MOST_STEPS_UNSAVED`."""
        return self.checkpoint_every or min(MOST_STEPS_UNSAVED, -(-self.total_steps // 4))


class RunConfig(Config):
    """One training run, resolved: what `config.json` of a run directory holds."""

    name: str = "run"
    """What the run is called: its folder, where no --out is given, is runs/NAME-DATE."""
    seed: NonNegativeInt = 0
    """Of the weights, the order of the data and all else that is drawn."""
    model: ModelConfig
    """What to train: a preset and what differs from it, or everything spelt out."""
    data: DataConfig = DataConfig()
    """What to learn from."""
    training: TrainingConfig
    """How long, in what pieces, where."""
    method: MethodConfig = PretrainingConfig()
    """How it trains; pre-training where nothing is said."""
    trainable: TrainableConfig = EverythingConfig()
    """What may move; everything where nothing is said."""
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=DEFAULT_LEARNING_RATE)
    """What turns gradients into steps."""
    schedule: ScheduleConfig = MultiStepConfig()
    """How the learning rate rises and falls over the run."""
    kernels: Kernels = Kernels()
    """How the model is computed."""
    balancing: BalancingConfig | None = None
    """How selection biases move; None: as by default, where the model has any."""
    mtp: MTPLossConfig | None = None
    """How much multi-token prediction counts; None: as by default, where the model has modules for it."""
    parallel: ParallelConfig = ParallelConfig()
    """How the processes that torchrun starts share the work; one process needs nothing."""
    start_from: str | None = None
    """A run or one checkpoint of it, an imported or a Hugging Face folder: this run begins with its model, weights and
    tokenizer."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.balancing is not None and not has_selection_bias(self.model):
            raise ValueError("[balancing] is set, and no router of the model has a selection bias: leave it out")
        if self.balancing is not None and not self.trainable.moves_routers:
            raise ValueError(
                f"[balancing] is set, and trainable.kind {self.trainable.kind!r} leaves routers as they are: leave "
                "[balancing] out"
            )
        if self.trainable.kind == "experts" and getattr(self.method, "mtp", None) == "train":
            raise ValueError(
                'method.mtp = "train" trains prediction modules, and trainable.kind "experts" nothing but experts: use '
                '"freeze" or "drop"'
            )
        if self.mtp is not None and not self.model.mtp:
            raise ValueError("[mtp] is set, and the model has no module for it: set model.mtp_depth, or leave it out")
        if len(self.model.mtp) >= self.data.sequence_length:
            raise ValueError(
                f"model.mtp_depth {len(self.model.mtp)} leaves nothing to predict in sequences of "
                f"{self.data.sequence_length} tokens"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        training, length = self.training, self.data.sequence_length
        for field in ("tokens_per_step", "micro_batch_tokens"):
            value = getattr(training, field)
            if value is not None and value % length:
                fits = max(length, value - value % length)
                if field == "tokens_per_step" and (unit := length * self.method.together) > length:
                    fits = max(1, round(value / unit)) * unit
                raise ValueError(
                    f"training.{field} {value} is not a multiple of data.sequence_length {length}: try {fits}"
                )
        self.method.refuse(self.sequences_per_step, length)
        if training.epochs is None and training.total_steps < 1:
            raise ValueError(
                f"training.tokens {training.tokens} is less than one step of {training.tokens_per_step}: raise it"
            )
        if self.data.tokenizer is None and self.data.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size {self.data.vocab_size} and model.vocab_size {self.model.vocab_size} differ: "
                "leave data.vocab_size out"
            )
        return self

    @property
    def resolved_balancing(self) -> BalancingConfig:
        """How selection biases move, with a rate."""
        still = not self.trainable.moves_routers or not self.method.moves_biases
        balancing = self.balancing or BalancingConfig(rate=0.0 if still else None)
        return balancing.resolved(self._known_steps, opened=self.start_from is not None)

    @property
    def _positions(self) -> int | None:
        if self.training.epochs is not None:
            return None
        return max(self._known_steps * self.sequences_per_step, self.trainable.reads_before)

    @property
    def _known_steps(self) -> int:
        """1 where the length is given in epochs, and the data has not been read."""
        return 1 if self.training.epochs is not None else self.training.total_steps

    @property
    def setting(self) -> Setting:
        """What the method is built on."""
        return Setting(
            model=self.model,
            data=self.data,
            start_from=self.start_from,
            seed=self.seed,
            sequences_per_step=self.sequences_per_step,
            positions=self._positions,
            max_gradient_norm=self.optimizer.max_gradient_norm,
            balancing=self.resolved_balancing,
            mtp=self.mtp or MTPLossConfig(),
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one step."""
        return self.training.tokens_per_step // self.data.sequence_length

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences of one micro-batch."""
        length = self.data.sequence_length
        if self.training.micro_batch_tokens is not None:
            return self.training.micro_batch_tokens // length
        return max(1, min(self.training.tokens_per_step, 16_384) // length)


def read_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """A recipe's raw tables with overrides applied, and what to call it in messages."""
    if isinstance(recipe, Mapping):
        return _laid_over(recipe, overrides), "recipe"
    path = Path(recipe)
    tables = read_tables(path)
    refuse_older(tables, path)  # the config.json of a run is a recipe too
    return _laid_over({"name": path.stem, **tables}, overrides), str(path)


def _laid_over(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tables` with `overrides` on top, of which one that gives the run's length replaces the length in the recipe."""
    asked, training = with_overrides({}, overrides).get("training"), tables.get("training")
    given = _LENGTHS & asked.keys() if isinstance(asked, Mapping) else set()
    if len(given) == 1 and isinstance(training, Mapping):
        gone = _LENGTHS | ({"max_tokens"} if "tokens" in given else set())  # a length in tokens says all
        kept = {key: value for key, value in training.items() if key not in gone}
        tables = {**tables, "training": kept}
    return with_overrides(tables, overrides)


def resolve_run(raw: Mapping[str, Any], source: str, *, begins_with: ModelConfig | None = None) -> RunConfig:
    """A recipe's tables to a RunConfig: the model's preset is expanded, the tokenizer sized for the model.

    Args:
        raw: its tables.
        source: named in errors.
        begins_with: the model that `start_from` will hold, where that is yet to be trained.

    Raises:
        ConfigError: unknown keys, missing fields, impossible combinations.
    """
    if "base" in raw or "arms" in raw:
        raise ConfigError(f"{source} is the recipe of a comparison: use `finemoe compare`")
    if not isinstance(raw.get("model", {}), Mapping) or not isinstance(raw.get("data", {}), Mapping):
        raise ConfigError(f"{source}: `model` and `data` must be tables")
    method = _method_of(raw)
    raw = with_defaults(raw, method.defaults)
    config = _resolve_model(raw, source, begins_with)
    if method is not PretrainingConfig:
        config = without_capacity(config)  # a policy that drops tokens is not the one that is measured and used
        if raw["method"].get("mtp") == "drop":
            config = config.model_copy(update={"mtp": ()})
    defaults: dict[str, Any] = {"vocab_size": config.vocab_size, "splitting": NEW_SPLITTING}
    if raw.get("start_from") is not None:  # its weights mean nothing without its tokenizer
        defaults["tokenizer"] = str(text_home(Path(str(raw["start_from"]))))
    data = {**defaults, **raw.get("data", {})}
    tables = {key: value for key, value in raw.items() if key != "balance"}  # now part of the model
    return parse(RunConfig, {**tables, "model": config.model_dump(), "data": data}, source)


def _method_of(raw: Mapping[str, Any]) -> Any:
    """The configuration class of the method; a kind that is not known is refused where all is parsed."""
    table = raw.get("method")
    kind = table.get("kind") if isinstance(table, Mapping) else None
    return METHODS[kind][0] if isinstance(kind, str) and kind in METHODS else PretrainingConfig


def _resolve_model(raw: Mapping[str, Any], source: str, begins_with: ModelConfig | None) -> ModelConfig:
    """The model that `start_from` holds, or will hold, or what [model] describes."""
    model = raw.get("model")
    if raw.get("start_from") is not None:
        path = Path(str(raw["start_from"]))
        if model is not None:
            resolved = parse(ModelConfig, model, f"{source}: model") if "blocks" in model else None  # a config.json
            if resolved is None or not can_begin_with(resolved, begins_with or read_model_config(path)):
                raise ConfigError(f"{source}: `start_from` brings its own model: leave [model] out")
            return resolved
        if path.suffix.lower() == ".gguf":
            raise ConfigError(f"{source}: start_from {path} is a GGUF file: `finemoe import {path} DIR`, then name DIR")
        return _rebalanced(begins_with or read_model_config(path), raw.get("balance"), source)
    if raw.get("balance") is not None:
        raise ConfigError(f"{source}: [balance] is for `start_from`; write it as model.feed_forward.balance")
    if model is None:
        raise ConfigError(f'{source}: `model` is missing; start with [model] preset = "tiny-moe"')
    if "blocks" in model:
        return parse(ModelConfig, model, f"{source}: model")
    return expand(resolve(model, f"{source}: model"))


def _rebalanced(config: ModelConfig, balance: Any, source: str) -> ModelConfig:
    """`config` with the balance losses of a recipe's [balance] in every layer whose router learns."""
    if balance is None:
        return config
    if not isinstance(balance, Mapping):
        raise ConfigError(f"{source}: `balance` must be a table")
    losses = parse(BalanceConfig, balance, f"{source}: balance")
    if not any(config.blocks[layer].feed_forward.router.learned for layer in config.moe_layers):
        raise ConfigError(f"{source}: [balance] is set, and no layer of the model learns to route: leave it out")
    try:
        return with_balance(config, losses)
    except ValidationError as error:
        raise ConfigError(f"{source}: balance: {in_words(ModelConfig, error)}") from error


def with_defaults(raw: Mapping[str, Any], of_method: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`raw` over the defaults of its partial tables, so that `--set schedule.warmup_share=0.1` needs nothing more."""
    defaults = {"schedule": {"kind": "multi_step"}, "optimizer": {"learning_rate": DEFAULT_LEARNING_RATE}}
    return merge(merge(defaults, of_method or {}), raw)


def read_config(path: Path) -> RunConfig:
    """A run directory's config.json.

    Raises:
        ConfigError: it is not one.
    """
    what = f"{path}: not the configuration of a run"
    raw = read_object(path, "put it back: each checkpoint of the run holds a copy", ConfigError, what=what)
    refuse_older(raw, path)
    return parse(RunConfig, raw, what)
