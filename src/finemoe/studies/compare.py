"""`finemoe compare`: several architectures at matched compute, paired seeds, intervals and verdicts.

Comparison directory: compare.json (resolved), tuning/ and calibration/ where asked for, arms/NAME/seed-N/ (each an
ordinary run directory), and the results: results.json, results.csv, report.html, figures/.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from finemoe.checkpoint.files import sole_writer, storage_error, write_text
from finemoe.core.config import parse, to_json
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import console
from finemoe.model.size import measure
from finemoe.studies.arms import SizedArm, solve
from finemoe.studies.config import CompareConfig, resolve_comparison
from finemoe.studies.fleet import Job, Outcome, run_fleet
from finemoe.studies.results import build_results, write_results
from finemoe.training.config import RunConfig, read_recipe
from finemoe.training.directory import read_summary
from finemoe.training.start import check_start, checkpoint_bytes, prepare_for

_CALIBRATION_STEPS = 10
_TUNING_SEED = 1000  # far from the seeds of the comparison: a rate must not be chosen on the run it is judged by


@dataclass(frozen=True)
class Comparison:
    """A comparison that ended or was interrupted."""

    directory: Path
    results: dict[str, Any]
    """Contents of results.json; what is finished so far when interrupted."""
    interrupted: bool
    failures: Mapping[str, str]
    """Message by run, of the runs that could not finish."""


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
    command = _command(recipe, overrides, out)
    arms = {
        name: solve(name, config.base, config.matching, config.routing, config.data.sequence_length)
        for name in config.arms
    }
    directory = Path(out) if out is not None else Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    parallel = min(config.parallel_runs or os.cpu_count() or 1, len(config.arms) * len(config.seeds))
    study = _Study(config, arms, directory, parallel, quiet)
    _is_ours(directory, config)
    study.check()
    data = prepare_for(study.example())
    if not quiet:
        _announce(arms, config, parallel)
    with sole_writer(directory):
        if not _is_ours(directory, config):
            write_text(directory / "compare.json", to_json(config))
        interrupted, failures = study.run()
        results = build_results(
            config, arms, directory, study.plan(), data.tokenizer, study.threads, parallel, failures, command
        )
        if results["arms"]:
            write_results(results, directory)
        elif not interrupted:
            raise RunError(f"{directory}: no run finished; first failure: {next(iter(failures.values()), 'none')}")
    return Comparison(directory, results, interrupted, failures)


def _command(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | None,
    overrides: Sequence[str],
    out: str | os.PathLike[str] | None,
) -> str:
    """The command that makes the same results again, or goes on with them."""
    if isinstance(recipe, Mapping):
        return "finemoe.compare(recipe) in Python, with the configuration below"
    words = ["finemoe", "compare", *([os.fspath(recipe)] if recipe is not None else [])]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--out", os.fspath(out)] if out is not None else []
    return shlex.join(words)


def _is_ours(directory: Path, config: CompareConfig) -> bool:
    """Whether `directory` holds this very comparison already; False where it can be begun.

    Raises:
        RunError: it holds something else.
    """
    path = directory / "compare.json"
    try:
        if path.exists():
            if parse(CompareConfig, json.loads(path.read_text(encoding="utf-8")), str(path)) != config:
                raise RunError(f"{directory} holds a comparison of another configuration; choose another --out")
            return True
        if directory.is_dir() and any(not inside.name.startswith(".") for inside in directory.iterdir()):
            raise RunError(f"{directory} is not empty and not a comparison; choose another --out")
    except OSError as error:
        raise storage_error(directory, error) from error
    return False


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

    def check(self) -> None:
        """Find before any work what would stop every run: settings, device, trackers, directory, space."""
        folders = [arm.folder for arm in self.arms.values()]
        if len(set(folders)) != len(folders):
            raise ConfigError(f"arms {sorted(self.arms)} need folder names that differ")
        if self.config.budget.kind == "flops":
            for name in self.arms:
                self._steps(name)
        largest = max((self._job("", name, 0, 1, 1.0).config for name in self.arms), key=checkpoint_bytes)
        check_start(largest, self.directory, copies=len(self.arms) * len(self.config.seeds))

    def example(self) -> RunConfig:
        """The configuration of one run, for what all runs share."""
        return self._job("", next(iter(self.arms)), 0, 1, 1.0).config

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
            self._job(
                f"arms/{self.arms[name].folder}/seed-{seed}",
                name,
                seed,
                plan[name]["steps"],
                plan[name]["learning_rate"],
            )
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
        found = {rate: read_summary(self._trial(name, rate)) for rate in self.config.tuning.learning_rates}
        return {rate: summary["final_validation_loss"] for rate, summary in found.items() if summary}

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
        }
        run = parse(RunConfig, tables, f"arm `{name}`")
        return Job(path.removeprefix("arms/"), run, self.directory / path)


def _announce(arms: Mapping[str, SizedArm], config: CompareConfig, parallel: int) -> None:
    """What is compared, and how well it is matched."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("Arm", no_wrap=True)
    table.add_column("Experts", no_wrap=True)
    for title in ("Total", "Active", "MFLOPs/token", "Off target"):
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
        "Off target: by how much rounding misses each arm's own parameters and FLOPs.\n"
        f"{len(arms) * len(config.seeds)} runs, {parallel} at a time, {config.budget.value:,.0f} "
        f"{config.budget.kind} each.",
        soft_wrap=True,
    )
