"""`finemoe compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.completion import complete_recipe
from finemoe.cli.output import Json, Out, Overrides, Quiet, check_recipe, print_json, print_rich, printable
from finemoe.core.errors import TrainingError

_Recipe = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML recipe; default: the built-in comparison.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
if TYPE_CHECKING:
    from finemoe.studies.compare import Comparison

_REASONS = Path("recipes/r1-zero.toml")
_SAMPLE_LINES = 8
"""Of each sample on the screen, where there are several; the page has them whole."""


def compare(
    recipe: _Recipe = None,
    overrides: Overrides = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train several designs at matched compute and rank them.

    Without a recipe: Dense, Hash Layer, Switch, GShard and DeepSeekMoE at a size that two CPU
    cores manage. Every arm sees the same tokens in the same order. Several seeds give
    confidence intervals and verdicts. The same --out goes on with what is not finished.

    \b
    Examples:
      finemoe compare --out runs/comparison
      finemoe compare --out runs/seeds --set "seeds=[0, 1, 2]" \\
        --set budget.value=500_000

    The directory then holds report.html, results.json, results.csv and figures/.
    """
    if recipe is not None:
        check_recipe(recipe, overrides or ())

    from finemoe.studies.compare import compare as run_comparison

    comparison = run_comparison(recipe, out=out, overrides=overrides or (), quiet=quiet)
    again = ["finemoe", "compare", *([str(recipe)] if recipe else []), "--out", str(comparison.directory)]
    again += [word for override in overrides or () for word in ("--set", override)]
    report_comparison(comparison, as_json, shlex.join(again))


def report_comparison(comparison: Comparison, as_json: bool, again: str) -> None:
    """Print what came out, and what to do next.

    Raises:
        typer.Exit: 130 when it was interrupted, after saying that `again` goes on.
        TrainingError: some runs failed.
    """
    from finemoe.core.logs import console

    directory = comparison.directory
    if as_json:
        print_json(comparison.results)
    elif comparison.results:
        from finemoe.studies.tables import comparison_table

        print_rich(comparison_table(comparison.results))
    if comparison.interrupted:
        text = f"Interrupted; what is finished is kept. Go on with: {again}"
        console().print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    if not as_json:
        _print_completion(comparison.results)
        arm = _shown_arm(comparison.results)
        seed = comparison.results["recipe"]["seeds"][0]
        run = directory / comparison.results["arms"][arm]["directory"] / f"seed-{seed}"
        prompt = next((sample["prompt"] for sample in comparison.results["arms"][arm]["samples"]), "")
        typer.echo(
            f"\nOpen  {directory / 'report.html'} in a browser; it works offline\n"
            f"Data  {directory / 'results.json'}, {directory / 'results.csv'}\n"
            f"Plots {directory / 'figures'}/\n\n"
            f"Talk  finemoe chat {shlex.quote(str(run))}        with /experts: who wrote what\n"
            f"      finemoe serve {shlex.quote(str(run))}       the same on a page, in colours\n"
            f"Try   finemoe generate {shlex.quote(str(run))} --prompt {shlex.quote(prompt)}\n"
            '      finemoe compare ... --set "seeds=[0, 1, 2]" --out DIR       to decide more pairs\n'
            "      finemoe compare ... --set budget.value=10_000_000 --out DIR  for longer runs"
        )
        if _REASONS.exists():  # where finemoe was installed without its repository there are no recipes
            typer.echo(
                f"Next  finemoe train {_REASONS} --out runs/r1-zero\n"
                "      a model teaches itself to reason, in five to ten minutes"
            )
    if comparison.failures:
        failed = "; ".join(f"{name}: {message}" for name, message in comparison.failures.items())
        raise TrainingError(f"{len(comparison.failures)} of the runs failed: {failed}")


def _shown_arm(results: dict[str, Any]) -> str:
    """DeepSeekMoE where it took part, else the arm with the lowest loss."""
    arms = results["arms"]
    return "deepseek-moe" if "deepseek-moe" in arms else min(arms, key=lambda arm: arms[arm]["validation_loss"]["mean"])


def _print_completion(results: dict[str, Any]) -> None:
    arm = results["arms"][_shown_arm(results)]
    for sample in arm["samples"]:
        typer.echo(f"\n{arm['label']} continues {sample['prompt']!r}:\n")
        lines = printable(sample["prompt"] + sample["completion"]).split("\n")
        for line in lines if len(arm["samples"]) == 1 else lines[:_SAMPLE_LINES]:
            typer.echo(f"  | {line}")
