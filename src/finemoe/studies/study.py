"""Study: the arms and seeds of a comparison as runs beneath one directory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import COMPARISON
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.files import storage_error
from finemoe.core.reading import damage_of, read_object, require_numbers
from finemoe.model.size import measure
from finemoe.runs.config import RunConfig
from finemoe.runs.start import check_start, checkpoint_bytes
from finemoe.studies.arms import SizedArm
from finemoe.studies.config import CompareConfig
from finemoe.studies.fleet import Job, Outcome, run_fleet
from finemoe.training.directory import SUMMARY, read_if_there, read_summary

_CALIBRATION_STEPS = 10
_TUNING_SEED = 1000  # far from the seeds of the comparison: a rate must not be chosen on the run it is judged by


@dataclass(frozen=True)
class Study:
    """A set of arms and seeds as runs beneath one directory: what is still to do, and in which order it is done."""

    config: CompareConfig
    arms: Mapping[str, SizedArm]
    directory: Path
    parallel: int
    quiet: bool
    description: str = "compare"

    @property
    def threads(self) -> int:
        """CPU threads of one run."""
        return self.config.training.threads or max(1, (os.cpu_count() or 1) // self.parallel)

    def check(self) -> None:
        """Find before any work what would stop every run: settings, device, trackers, directory, space."""
        folders = [arm.folder for arm in self.arms.values()]
        if len(set(folders)) != len(folders):
            raise ConfigError(f"arms {sorted(self.arms)} need folder names that differ")
        if self.config.budget.kind == "flops":
            for name in self.arms:
                self._steps(name)
        largest = max((self._job("", name, 0, 1, 1.0).config for name in self.arms), key=checkpoint_bytes)
        homes = [self.directory / "arms" / folder / f"seed-{seed}" for folder in folders for seed in self.config.seeds]
        missing = sum(not (home / SUMMARY).exists() for home in homes)  # the others have their checkpoints
        check_start(largest, self.directory, missing, min(self.parallel, missing))

    def example(self) -> RunConfig:
        """The configuration of one run, for what all runs share."""
        return self._job("", next(iter(self.arms)), 0, 1, 1.0).config

    def run(self, only: Collection[str] | None = None) -> tuple[bool, dict[str, str]]:
        """Run what is not finished, of the arms `only` where given: (interrupted, failures by run)."""
        failures: dict[str, str] = {}
        for prepare_step in (self._tune, self._calibrate):
            outcome = prepare_step()
            failures |= outcome.failures
            if outcome.interrupted:
                return True, failures
        plan = self.plan()
        jobs = [
            self._job(
                f"arms/{self.arms[name].folder}/seed-{seed}",
                name,
                seed,
                plan[name]["steps"],
                plan[name]["learning_rate"],
            )
            for seed in self.config.seeds
            for name in sorted(plan, key=self._cost, reverse=True)  # longest first, so that no core idles
            if only is None or name in only
        ]
        outcome = run_fleet(jobs, self.parallel, description=self.description, quiet=self.quiet)
        return outcome.interrupted, failures | outcome.failures

    def plan(self) -> dict[str, dict[str, Any]]:
        """Steps and learning rate by arm, from what tuning and calibration left on disk; who failed there is absent."""
        ready = [name for name in self.arms if self._is_ready(name)]
        return {name: {"steps": self._steps(name), "learning_rate": self._learning_rate(name)} for name in ready}

    def _is_ready(self, name: str) -> bool:
        tuned = self.config.tuning is None or bool(self.trials(name))
        return tuned and (self.config.budget.kind != "seconds" or self._calibration(name) is not None)

    def _calibration(self, name: str) -> dict[str, Any] | None:
        return read_summary(self.directory / "calibration" / self.arms[name].folder)

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
        if value < per_step:
            raise ConfigError(
                f"budget.value {self.config.budget.value:g} {self.config.budget.kind} is less than one step of arm "
                f"`{name}`: raise it"
            )
        return int(value / per_step)

    def _learning_rate(self, name: str) -> float:
        trials = self.trials(name)
        if trials:
            return min(trials, key=lambda rate: trials[rate])
        return self.config.learning_rates.get(name, self.config.optimizer.learning_rate)

    def trials(self, name: str) -> dict[float, float]:
        """Validation loss by learning rate of the finished trials of an arm; a failed trial is absent."""
        if self.config.tuning is None:
            return {}
        found = {rate: final_loss(self._trial(name, rate)) for rate in self.config.tuning.learning_rates}
        return {rate: loss for rate, loss in found.items() if loss is not None}

    def _trial(self, name: str, rate: float) -> Path:
        return self.directory / "tuning" / self.arms[name].folder / f"lr-{rate}"

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
                f"calibration/{self.arms[name].folder}",
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
            "evaluate_every": evaluate_every,
        }
        training = config.training.model_copy(update=changed)
        tables = {
            "name": path,
            "seed": seed,
            "model": self.arms[name].model,
            "data": config.data,
            "training": training,
            "optimizer": config.optimizer.model_copy(update={"learning_rate": learning_rate}),
            "schedule": config.schedule,
            "balancing": self.arms[name].balancing,
        }
        run = parse(RunConfig, tables, f"arm `{name}`")
        return Job(path.removeprefix("arms/"), run, self.directory / path)


def final_loss(run: Path) -> float | None:
    """Validation loss at the end of a run; None where it is not finished.

    Raises:
        RunError: its summary is damaged.
    """
    summary = read_summary(run)
    if summary is None:
        return None
    with damage_of(run / SUMMARY, "remove it, and the same command writes it again"):
        require_numbers(summary, ("final_validation_loss",))
    return float(summary["final_validation_loss"])


def read_study(directory: Path) -> CompareConfig:
    """What the comparison in `directory` is made of.

    Raises:
        ConfigError: it cannot be read.
        RunError: there is none.
    """
    raw = read_if_there(directory / COMPARISON)
    if raw is None:
        raise RunError(f"{directory} holds no comparison (no {COMPARISON})")
    return parse(CompareConfig, raw, str(directory / COMPARISON))


def holds_study(directory: Path, config: CompareConfig) -> bool:
    """Whether `directory` holds this very comparison already; False where it can be begun.

    Raises:
        RunError: it holds something else.
    """
    path = directory / COMPARISON
    try:
        if path.exists():
            found = parse(CompareConfig, read_object(path, "put it back, or choose another --out"), str(path))
            if _without_habits(found) != _without_habits(config):
                raise RunError(f"{directory} holds a comparison of another configuration; choose another --out")
            return True
        if directory.is_dir() and any(not inside.name.startswith(".") for inside in directory.iterdir()):
            raise RunError(f"{directory} is not empty and not a comparison; choose another --out")
    except OSError as error:
        raise storage_error(directory, error) from error
    return False


def _without_habits(config: CompareConfig) -> CompareConfig:
    """`config` but for when it saves and what it checks first: their defaults may change, and no result does."""
    habits = {"checkpoint_every": None, "checkpoint_minutes": 0.0, "keep_checkpoints": 1, "memory_check": True}
    return config.model_copy(update={"training": config.training.model_copy(update=habits)})
