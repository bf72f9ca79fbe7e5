"""What a key of a stage should be: each value tried on a seed that nothing is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finemoe.core.config import with_overrides
from finemoe.core.errors import ConfigError, RunError
from finemoe.studies.staged.config import StudyConfig, TunedConfig
from finemoe.studies.staged.family import line, parents
from finemoe.studies.staged.records import failed_of, records_of
from finemoe.studies.staged.seeds import run_seeds
from finemoe.studies.staged.worker import Job

Trial = tuple[dict[str, Any], list[dict[float, str]]]
"""Tables of a recipe, and for everything that is tuned the names of its stages by value."""


@dataclass(frozen=True)
class Tuned:
    """What came of the trials."""

    interrupted: bool = False
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why trials failed, by the name of their process."""
    chosen: tuple[str, ...] = ()
    """Overrides of a recipe: the best value of every key."""
    trials: tuple[dict[str, Any], ...] = ()
    """Of every key what was tried, and what each value came to."""


def tune(config: StudyConfig, trial: Trial, path: Path, directory: Path, laid: Sequence[str], quiet: bool) -> Tuned:
    """Try the values, in one process.

    A value that cannot be trained with, such as a rate that is too high, is not the best.

    Raises:
        RunError: the trials were killed, or none of a key's came to anything: the best is not known.
    """
    if not config.tuned:
        return Tuned()
    tables, names = trial
    job = Job(tables, str(path), str(directory / "tuning"), config.tuning_seed, _for_trials(laid, config, trial))
    outcome = run_seeds({"tuning": job}, 1, "tuning", quiet=quiet)
    done, failed = records_of(directory / "tuning", tables), failed_of(directory / "tuning")
    chosen, trials = [], []
    for one, tried in zip(config.tuned, names, strict=True):
        came_to = {value: done[name]["figures"][one.figure] for value, name in tried.items() if name in done}
        failures = {value: failed[name] for value, name in tried.items() if name in failed and name not in done}
        trials.append({
            **one.model_dump(mode="json"),
            "came_to": {f"{value:g}": came_to.get(value) for value in tried if value in came_to or value in failures},
        })  # fmt: skip
        if came_to and len(came_to) + len(failures) == len(tried):
            chosen.append(f"stage.{one.stage}.{one.key}={best(came_to)}")
        elif not outcome.interrupted:
            why = next(iter(failures.values()), next(iter(outcome.failures.values()), "they were not run"))
            raise RunError(
                f"{directory}: the best {one.key} of {one.stage} is not known, since trials came to nothing: {why}. "
                "The same command goes on with them"
            )
    return Tuned(outcome.interrupted, dict(outcome.failures), tuple(chosen), tuple(trials))


def best(came_to: Mapping[float, float]) -> float:
    """The value of the highest figure; the first of equals."""
    return max(came_to, key=lambda value: came_to[value])


def require_free(tuned: Sequence[TunedConfig], laid: Sequence[str]) -> None:
    """Raises ConfigError where an override is of a key that is tried: it would take the place of every value."""
    for override in laid:
        key = override.partition("=")[0].strip()
        for one in tuned:
            if key in (one.key, f"stage.{one.stage}.{one.key}"):
                raise ConfigError(
                    f"--set {override}: study.tuned tries values of {one.key} for {one.stage}; leave it out, or take "
                    "that trial out of study.tuned"
                )


def _for_trials(laid: Sequence[str], config: StudyConfig, trial: Trial) -> list[str]:
    """Overrides by the names that stages have among the trials."""
    tables, names = trial
    known = {str(one["name"]) for one in tables["stage"]}
    tried: dict[str, list[str]] = {one.stage: [] for one in config.tuned}
    for one, found in zip(config.tuned, names, strict=True):
        tried[one.stage] += found.values()
    put: list[str] = []
    for override in laid:
        name, _, rest = override.removeprefix("stage.").partition(".")
        if not override.startswith("stage."):
            put.append(override)
        elif name in tried:
            put += [f"stage.{other}.{rest}" for other in tried[name]]
        elif name in known:
            put.append(override)
    return put


def expanded(tuned: Sequence[TunedConfig], raw: Mapping[str, Any], source: str) -> Trial:
    """The recipe of the trials: what the tuned stages come from, and each once with every value; names by value."""
    family = parents(raw["stage"])
    first = {one.stage for one in tuned}
    needed = {name for one in tuned for name in line(one.stage, family)} - first
    tables = {str(one["name"]): one for one in raw["stage"]}
    for one in tuned:
        if wrong := [name for name in line(one.stage, family) if name in first and name != one.stage]:
            raise ConfigError(f"{source}: study.tuned: {one.stage} comes from {wrong[0]}, which is tuned too")
    stages, names = [table for name, table in tables.items() if name in needed], []
    for number, one in enumerate(tuned):
        names.append({value: f"{one.stage}-{number}-{place}" for place, value in enumerate(one.values)})
        for value, name in names[-1].items():
            stages.append({**with_overrides(tables[one.stage], [f"{one.key}={value}"]), "name": name})
    return {**raw, "stage": stages}, names
