"""`finemoe compare`: several architectures at matched compute, paired seeds, intervals and verdicts.

Comparison directory: compare.json (resolved), tuning/ and calibration/ where asked for, arms/NAME/seed-N/ (each an
ordinary run directory), and the results: results.json, results.csv, report.html, figures/.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from finemoe.checkpoint.files import storage_error, write_text
from finemoe.core.config import Config, parse, to_json
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import console
from finemoe.data import DataConfig, prepare
from finemoe.model.config import ModelRecipe
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.studies.arms import MatchingConfig, RoutingConfig, SizedArm, solve
from finemoe.studies.fleet import Job, Outcome, run_fleet
from finemoe.studies.results import build_results, write_results
from finemoe.training.config import DEFAULT_LEARNING_RATE, RunConfig, TrainingConfig, read_recipe
from finemoe.training.optimizer import OptimizerConfig
from finemoe.training.run import read_summary
from finemoe.training.schedule import MultiStepConfig, ScheduleConfig

_CALIBRATION_STEPS = 10
_TUNING_SEED = 1000  # far from the seeds of the comparison: a rate must not be chosen on the run it is judged by


class BudgetConfig(Config):
    """What every arm gets the same of."""

    kind: Literal["tokens", "flops", "seconds"] = "tokens"
    value: PositiveFloat = 2_000_000
    """Tokens, training FLOPs, or seconds of training on this machine, for each run."""


class TuningConfig(Config):
    """The same learning-rate search for every arm, on a seed of its own, before the comparison."""

    learning_rates: tuple[PositiveFloat, ...]
    tokens: PositiveInt
    """Length of each trial run."""


class CompareConfig(Config):
    """A comparison. Every field has a default: `finemoe compare` runs as it is."""

    name: str = "compare"
    title: str = "DeepSeekMoE and its baselines at matched compute"
    arms: tuple[str, ...] = ("dense", "hash", "switch", "gshard", "deepseek-moe")
    seeds: tuple[NonNegativeInt, ...] = (0,)
    base: ModelRecipe
    """A dense model; its feed-forward layer is the standard FFN that the arms are sized from."""
    matching: MatchingConfig = MatchingConfig()
    routing: RoutingConfig = RoutingConfig()
    budget: BudgetConfig = BudgetConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig(steps=1)
    """As in a run's recipe, without its length, which is the budget's."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=DEFAULT_LEARNING_RATE)
    learning_rates: Mapping[str, PositiveFloat] = {}
    """By arm, where it differs from optimizer.learning_rate."""
    tuning: TuningConfig | None = None
    schedule: ScheduleConfig = MultiStepConfig()
    parallel_runs: NonNegativeInt = 0
    """Runs at the same time, each with an equal share of the threads. 0: one a core."""
    prompt: str = "def "
    """What every arm completes in the report."""

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
        return self


@dataclass(frozen=True)
class Comparison:
    """A comparison that ended or was interrupted."""

    directory: Path
    results: dict[str, Any]
    """Contents of results.json; what is finished so far when interrupted."""
    interrupted: bool


def compare(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Comparison:
    """Run a comparison, or go on with the one in `out`.

    Raises:
        ConfigError, DataError: the recipe cannot work; nothing was written.
        RunError: `out` holds something else, or no run finished.
    """
    raw, source = read_recipe({} if recipe is None else recipe, overrides)
    config = resolve_comparison(raw, source)
    arms = {
        name: solve(name, config.base, config.matching, config.routing, config.data.sequence_length)
        for name in config.arms
    }
    data = prepare(config.data)
    data.require_batch(config.training.tokens_per_step // config.data.sequence_length)
    directory = Path(out) if out is not None else Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _claim(directory, config)
    parallel = min(config.parallel_runs or os.cpu_count() or 1, len(config.arms) * len(config.seeds))
    if not quiet:
        _announce(arms, config, parallel)
    study = _Study(config, arms, directory, parallel, quiet)
    interrupted, failures = study.run()
    results = build_results(
        config, arms, directory, study.plan(), data.tokenizer, study.threads, parallel, failures, source
    )
    if not results["arms"]:
        if interrupted:
            return Comparison(directory, results, interrupted=True)
        raise RunError(f"{directory}: no run finished; first failure: {next(iter(failures.values()), 'none')}")
    write_results(results, directory)
    return Comparison(directory, results, interrupted)


def resolve_comparison(raw: Mapping[str, Any], source: str) -> CompareConfig:
    """A recipe's tables to a CompareConfig; `base` may start from a dense preset.

    Raises:
        ConfigError: unknown keys, impossible values.
    """
    if "model" in raw:
        raise ConfigError(f"{source} is the recipe of one run: use `finemoe train`, or name it among the `arms`")
    training = raw.get("training", {})
    for field in ("tokens", "steps"):
        if field in training:
            raise ConfigError(f"{source}: training.{field}: a comparison's length is [budget] kind and value")
    base = resolve(raw.get("base", {"preset": "tiny-dense"}), f"{source}: base")
    data = {"vocab_size": base.vocab_size, **raw.get("data", {})}
    filled = {**raw, "base": base.model_dump(), "data": data, "training": {**training, "steps": 1}}
    return parse(CompareConfig, filled, source)


def _claim(directory: Path, config: CompareConfig) -> None:
    """Make the directory ours, or find that it already is."""
    path = directory / "compare.json"
    try:
        if path.exists():
            stored = parse(CompareConfig, json.loads(path.read_text(encoding="utf-8")), str(path))
            if stored != config:
                raise RunError(f"{directory} holds a comparison of another configuration; choose another --out")
            return
        if directory.is_dir() and any(directory.iterdir()):
            raise RunError(f"{directory} is not empty and not a comparison; choose another --out")
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(directory, error) from error
    write_text(path, to_json(config))


@dataclass(frozen=True)
class _Study:
    config: CompareConfig
    arms: Mapping[str, SizedArm]
    directory: Path
    parallel: int
    quiet: bool

    @property
    def threads(self) -> int:
        return self.config.training.threads or max(1, (os.cpu_count() or 1) // self.parallel)

    def run(self) -> tuple[bool, dict[str, str]]:
        """(interrupted, failures by run)."""
        failures: dict[str, str] = {}
        for prepare_step in (self._tune, self._calibrate):
            outcome = prepare_step()
            failures |= outcome.failures
            if outcome.interrupted:
                return True, failures
        plan = self.plan()
        jobs = [
            self._job(f"arms/{name}/seed-{seed}", name, seed, plan[name]["steps"], plan[name]["learning_rate"])
            for seed in self.config.seeds
            for name in sorted(plan, key=self._cost, reverse=True)  # longest first, so that no core idles
        ]
        outcome = run_fleet(jobs, self.parallel, description="compare", quiet=self.quiet)
        return outcome.interrupted, failures | outcome.failures

    def plan(self) -> dict[str, dict[str, Any]]:
        """Steps and learning rate by arm, from what tuning and calibration left on disk; who failed there is absent."""
        ready = [name for name in self.arms if self._is_ready(name)]
        return {name: {"steps": self._steps(name), "learning_rate": self._learning_rate(name)} for name in ready}

    def _is_ready(self, name: str) -> bool:
        tuned = self.config.tuning is None or bool(self.trials(name))
        return tuned and (self.config.budget.kind != "seconds" or self._calibration(name) is not None)

    def _calibration(self, name: str) -> dict[str, Any] | None:
        return read_summary(self.directory / "calibration" / name)

    def _cost(self, name: str) -> float:
        return measure(self.arms[name].model, self.config.data.sequence_length).training_flops_per_token

    def _steps(self, name: str) -> int:
        value, per_step = self.config.budget.value, self.config.training.tokens_per_step
        if self.config.budget.kind == "flops":
            value = value / self._cost(name)
        elif self.config.budget.kind == "seconds":
            calibration = self._calibration(name)
            assert calibration is not None  # else the arm is not in the plan
            value = value * calibration["tokens_per_second"]
        return max(1, int(value / per_step))

    def _learning_rate(self, name: str) -> float:
        trials = self.trials(name)
        if trials:
            return min(trials, key=lambda rate: trials[rate])
        return self.config.learning_rates.get(name, self.config.optimizer.learning_rate)

    def trials(self, name: str) -> dict[float, float]:
        """Validation loss by learning rate of the finished trials of an arm; a failed trial is absent."""
        if self.config.tuning is None:
            return {}
        found = {rate: read_summary(self._trial(name, rate)) for rate in self.config.tuning.learning_rates}
        return {rate: summary["final_validation_loss"] for rate, summary in found.items() if summary}

    def _trial(self, name: str, rate: float) -> Path:
        return self.directory / "tuning" / name / f"lr-{rate:g}"

    def _tune(self) -> Outcome:
        """Try every rate on every arm."""
        if self.config.tuning is None:
            return Outcome()
        steps = max(1, self.config.tuning.tokens // self.config.training.tokens_per_step)
        jobs = [
            self._job(
                str(self._trial(name, rate).relative_to(self.directory)),
                name,
                _TUNING_SEED,
                steps,
                rate,
                steps,
            )
            for rate in self.config.tuning.learning_rates
            for name in self.arms
        ]
        return run_fleet(jobs, self.parallel, description="tuning", quiet=self.quiet)

    def _calibrate(self) -> Outcome:
        """Measure each arm's speed, under the load it will run with."""
        if self.config.budget.kind != "seconds":
            return Outcome()
        jobs = [
            self._job(
                f"calibration/{name}",
                name,
                _TUNING_SEED,
                _CALIBRATION_STEPS,
                self.config.optimizer.learning_rate,
            )
            for name in self.arms
        ]
        return run_fleet(jobs, self.parallel, description="calibrating", quiet=self.quiet)

    def _job(
        self,
        path: str,
        name: str,
        seed: int,
        steps: int,
        learning_rate: float,
        evaluate_every: int | None = None,
    ) -> Job:
        config = self.config
        evaluate_every = evaluate_every or config.training.evaluate_every
        changed = {
            "steps": steps,
            "threads": self.threads,
            "keep_checkpoints": 1,
            "evaluate_every": evaluate_every,
        }
        training = config.training.model_copy(update=changed)
        run = RunConfig(
            name=path,
            seed=seed,
            model=self.arms[name].model,
            data=config.data,
            training=training,
            optimizer=config.optimizer.model_copy(update={"learning_rate": learning_rate}),
            schedule=config.schedule,
        )
        return Job(path.removeprefix("arms/"), run, self.directory / path)


def _announce(arms: Mapping[str, SizedArm], config: CompareConfig, parallel: int) -> None:
    """What is compared, and how well it is matched."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("Arm", no_wrap=True)
    table.add_column("Experts", no_wrap=True)
    for title in ("Total", "Active", "MFLOPs/token", "Mismatch"):
        table.add_column(title, justify="right", no_wrap=True)
    for arm in arms.values():
        size = measure(arm.model, config.data.sequence_length)
        missed = [abs(value) for value in arm.mismatch.values() if value is not None]
        table.add_row(
            arm.label,
            arm.routing,
            f"{size.total_parameters / 1e6:.2f}M",
            f"{size.active_parameters / 1e6:.2f}M",
            f"{size.training_flops_per_token / 1e6:.2f}",
            f"{max(missed):.1f} %" if missed else "as it is",
        )
    screen = console()
    screen.print(table)
    screen.print(
        f"Mismatch: the largest miss of expert parameters (total, active) and FLOPs against their targets.\n"
        f"{len(arms) * len(config.seeds)} runs, {parallel} at a time, {config.budget.value:,.0f} "
        f"{config.budget.kind} each.",
        soft_wrap=True,
    )
