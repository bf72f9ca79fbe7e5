"""`finemoe paper`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import Json, Out, Quiet, plain_table, print_json, print_rich
from finemoe.core.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finemoe.studies.paper import Paper


def paper(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="Stages and claims of your own, instead.", show_default=False),
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="SCALE", help="How large; see --list. Without one: tiny.")
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAMES", help="Experiments, such as table1,figure4; see --list.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of the scale's recipe, such as base.hidden_size=128; repeatable.",
        ),
    ] = None,
    out: Out = None,
    listing: Annotated[bool, typer.Option("--list", help="List scales and experiments, and run nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Re-run the papers' experiments in miniature.

    It says which claims hold: DeepSeekMoE sections 4.2 to 4.5, V3's two ablations and Loss-Free
    Balancing's MaxVio, each claim with the printed figure, ours, an interval over seeds and a
    verdict. Runs that are finished are used again: add experiments one by one, interrupt and go
    on as you like. With a RECIPE that has [[stage]] tables and a table [study], its stages are run
    once a seed, every stage's model is examined, and the recipe's own claims are judged. Seeds run
    side by side; what [[study.tuned]] tries runs before them, one trial after the other in one process.

    \b
    Examples:
      finemoe paper --list
      finemoe paper --scale tiny --only table1,figure4
      finemoe paper --scale small --set "seeds=[0, 1]" --out runs/two-seeds
      finemoe paper recipes/reasoning.toml --set "study.seeds=[0, 1]"

    --out is runs/paper-SCALE (or RECIPE) unless given. It then holds report.html, results.json,
    summary.md and figures/, and every run as an ordinary run directory under arms/ or seeds/.
    """
    if listing:
        _list(as_json)
        return
    if recipe is not None:
        study = _staged(recipe, scale, only, overrides or (), out, quiet)
    else:
        study = _scaled(scale or "tiny", only, overrides or (), out, quiet)
    if as_json:
        print_json(study.results)
    elif study.results and (table := _table(study.results)).row_count:
        print_rich(table)
    if study.interrupted:
        _say_how_to_go_on(recipe, scale or "tiny", only, overrides or (), out)
        raise typer.Exit(130)
    if not as_json:
        _say_where(study)
    _require_all(study)


def _require_all(study: Paper) -> None:
    """Raises TrainingError where a run failed."""
    if study.failures:
        failed = "; ".join(f"{name}: {message}" for name, message in study.failures.items())
        raise TrainingError(f"{len(study.failures)} of the runs failed: {failed}")


def _scaled(scale: str, only: str | None, overrides: Sequence[str], out: Path | None, quiet: bool) -> Paper:
    """The study of the papers' experiments at a scale.

    Raises:
        ConfigError: --only without a name.
    """
    from finemoe.studies.paper import paper as run_paper

    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    if only is not None and not names:
        raise ConfigError("--only names no experiment; see --list")
    return run_paper(scale, only=names, out=out, overrides=overrides, quiet=quiet)


def _staged(
    recipe: Path, scale: str | None, only: str | None, overrides: Sequence[str], out: Path | None, quiet: bool
) -> Paper:
    """The study of a recipe's stages.

    Raises:
        ConfigError: options of the other kind of study.
    """
    for name, value in (("--scale", scale), ("--only", only)):
        if value is not None:
            raise ConfigError(f"{name} {value}: {recipe} says itself what is run; leave {name} out, or the recipe")

    from finemoe.studies.staged.study import study as run_study

    return run_study(recipe, out=out, overrides=overrides, quiet=quiet)


def _say_how_to_go_on(
    recipe: Path | None, scale: str, only: str | None, overrides: Sequence[str], out: Path | None
) -> None:
    from finemoe.core.logs import console

    asked = [str(recipe)] if recipe is not None else ["--scale", scale, *(["--only", only] if only else [])]
    again = ["finemoe", "paper", *asked, *(word for override in overrides for word in ("--set", override))]
    again += ["--out", str(out)] if out else []
    text = f"Interrupted; what is finished is kept. Go on with: {shlex.join(again)}"
    console().print(text, markup=False, soft_wrap=True)


def _say_where(study: Paper) -> None:
    from finemoe.charts.paper.words import counted

    results, directory = study.results, study.directory
    scale = [f"Scale {results['scale']}: {results['scale_about']}."] if "scale" in results else []
    print_rich("", counted(results), *scale)
    typer.echo(f"\nOpen  {directory / 'report.html'} in a browser; it works offline")
    typer.echo(f"Data  {directory / 'results.json'}, {directory / 'summary.md'}")


def _list(as_json: bool) -> None:
    from finemoe.studies.claims import EXPERIMENTS
    from finemoe.studies.scales import SCALES

    if as_json:
        experiments = {
            name: {"title": one.title, "arms": one.all_arms, "claims": [claim.statement for claim in one.claims]}
            for name, one in EXPERIMENTS.items()
        }
        print_json({"scales": {name: scale.about for name, scale in SCALES.items()}, "experiments": experiments})
        return
    typer.echo("Scales")
    for name, scale in SCALES.items():
        typer.echo(f"  {name:12} {scale.about}")
    typer.echo("\nExperiments")
    for name, experiment in EXPERIMENTS.items():
        typer.echo(f"  {name:12} {len(experiment.all_arms):2} arms  {experiment.title}")


def _table(results: dict[str, Any]) -> Any:
    """One line a claim, for 80 columns."""
    from finemoe.charts.numbers import fixed

    table = plain_table()
    table.add_column("Claim", max_width=33)
    table.add_column("Difference (95 %)", justify="right", no_wrap=True)
    both = any(claim["on_training_text"] for one in results["experiments"].values() for claim in one["claims"])
    table.add_column("Held out" if both else "Verdict", no_wrap=True)
    if both:
        table.add_column("Training", no_wrap=True)
    for experiment in results["experiments"].values():
        for claim in experiment["claims"]:
            found = claim["difference"] or {}
            if claim["verdict"] == "not run":
                continue  # of experiments that nobody asked for; how many there are is said below
            text = fixed(found.get("mean"))
            if found.get("low") is not None:
                text += f" ± {fixed((found['high'] - found['low']) / 2)}"
            style = {"contradicted": "bold red", "reproduced": "green"}.get(claim["verdict"], "dim")
            twin = claim["on_training_text"]
            more = [twin["verdict"] if twin else ""] if both else []
            table.add_row(claim["statement"], text, claim["verdict"], *more, style=style)
    return table
