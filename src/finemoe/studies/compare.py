"""`finemoe compare`: several architectures at matched compute, paired seeds, intervals and verdicts.

Comparison directory: compare.json (resolved), tuning/ and calibration/ where asked for, arms/NAME/seed-N/ (each an
ordinary run directory), and the results: results.json, results.csv, report.html, figures/.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from finemoe.core.config import did_you_mean, to_json
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.files import sole_writer, write_text
from finemoe.core.logs import as_html, as_text, console
from finemoe.model.size import measure
from finemoe.runs.config import read_recipe
from finemoe.runs.listing import is_study_of_papers
from finemoe.runs.start import build_method, default_directory
from finemoe.studies.arms import SizedArm, solve
from finemoe.studies.config import CompareConfig, resolve_comparison
from finemoe.studies.results import build_results, write_results
from finemoe.studies.study import Study, holds_study, read_study
from finemoe.studies.tables import comparison_table
from finemoe.training.directory import read_if_there


@dataclass(frozen=True)
class Comparison:
    """A comparison that ended or was interrupted."""

    directory: Path
    results: dict[str, Any] = field(repr=False)
    """Contents of results.json; what is finished so far when interrupted."""
    interrupted: bool
    failures: Mapping[str, str]
    """Message by run, of the runs that could not finish."""

    def __str__(self) -> str:
        """The table that `finemoe compare` prints."""
        return as_text(comparison_table(self.results)) if self.results.get("arms") else repr(self)

    def _repr_html_(self) -> str:
        return as_html(comparison_table(self.results)) if self.results.get("arms") else as_html(repr(self))

    def plot(self, figure: str = "loss_tokens") -> Any:
        """A figure of the report as an altair chart, which notebooks show; `.save("loss.png")` writes it.

        Args:
            figure: loss_tokens, loss_flops, loss_seconds, final_loss, pairs, paper or load, where there is one.

        Raises:
            ConfigError: there is no such figure.
        """
        from finemoe.charts.comparison.figures import figures

        made = figures(self.results) if self.results.get("arms") else {}
        if figure not in made:
            raise ConfigError(f"plot: there is no figure {figure!r}{did_you_mean(figure, list(made))}")
        return made[figure]


def compare(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | CompareConfig | None = None,
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
    if isinstance(recipe, CompareConfig):
        config = recipe
    else:
        config = resolve_comparison(*read_recipe({} if recipe is None else recipe, overrides))
    command = _command(recipe, overrides, out)
    arms = {
        name: solve(name, config.base, config.matching, config.routing, config.data.sequence_length)
        for name in config.arms
    }
    directory = Path(out) if out is not None else default_directory(config.name)
    parallel = min(config.parallel_runs or os.cpu_count() or 1, len(config.arms) * len(config.seeds))
    study = Study(config, arms, directory, parallel, quiet)
    holds_study(directory, config)
    study.check()
    data = build_method(study.example()).data  # into the cache, once for all runs
    if not quiet:
        _announce(arms, config, parallel)
    with sole_writer(directory):
        if not holds_study(directory, config):
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


def go_on(directory: str | os.PathLike[str], *, quiet: bool = False) -> Comparison:
    """Go on with the comparison in `directory`, as it was begun; a finished one is read again.

    Raises:
        ConfigError, DataError: what it was made of cannot be read any more.
        RunError: it holds no comparison, or a study of `finemoe paper`, which its own verb goes on with.
    """
    directory = Path(directory)
    config = read_study(directory)
    if is_study_of_papers(config.model_dump()):
        scale = config.name.removeprefix("paper-")
        known = read_if_there(directory / "results.json")
        command = known["command"] if known and "command" in known else f"finemoe paper --scale {scale}"
        command = command if "--out" in command else f"{command} --out {shlex.quote(str(directory))}"
        raise RunError(f"{directory} is a study of the papers' claims; go on with: {command}")
    return compare(config, out=directory, quiet=quiet)


def _command(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | CompareConfig | None,
    overrides: Sequence[str],
    out: str | os.PathLike[str] | None,
) -> str:
    """The command that makes the same results again, or goes on with them."""
    if isinstance(recipe, CompareConfig):
        return f"finemoe resume {shlex.quote(os.fspath(out or ''))}"
    if isinstance(recipe, Mapping):
        return "finemoe.compare(recipe) in Python, with the configuration below"
    words = ["finemoe", "compare", *([os.fspath(recipe)] if recipe is not None else [])]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--out", os.fspath(out)] if out is not None else []
    return shlex.join(words)


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
