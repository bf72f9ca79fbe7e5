"""`finemoe compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.output import Json, Out, Overrides, Quiet, print_json, print_rich


def compare(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A TOML recipe; default: the built-in comparison.", show_default=False),
    ] = None,
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
      finemoe compare --out runs/seeds --set "seeds=[0, 1, 2]" --set budget.value=500_000

    The directory then holds report.html, results.json, results.csv and figures/.
    """
    from finemoe.core.logs import console
    from finemoe.studies.compare import compare as run_comparison

    comparison = run_comparison(recipe, out=out, overrides=overrides or (), quiet=quiet)
    directory = comparison.directory
    if as_json:
        print_json(comparison.results)
    elif comparison.results:
        from finemoe.studies.tables import comparison_table

        print_rich(comparison_table(comparison.results))
    if comparison.interrupted:
        again = ["finemoe", "compare", *([str(recipe)] if recipe else []), "--out", str(directory)]
        again += [word for override in overrides or () for word in ("--set", override)]
        text = f"Interrupted; what is finished is kept. Go on with: {shlex.join(again)}"
        console().print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    if not as_json:
        typer.echo(
            f"\nRead  {directory / 'report.html'} (opens offline in a browser)\n"
            f"Data  {directory / 'results.json'}, {directory / 'results.csv'}\n"
            f"Plots {directory / 'figures'}/\n\n"
            'Next: --set "seeds=[0, 1, 2]" for narrower intervals, --set budget.value=... for longer runs.'
        )
