"""`finemoe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.output import Json, Out, Overrides, Quiet, check_recipe, report_run


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML recipe.", show_default=False)],
    overrides: Overrides = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the model that a recipe describes.

    A recipe is a TOML file; the smallest names a preset and a number of tokens. Ctrl-C saves
    and stops; `finemoe resume` goes on where it stopped, bit for bit.

    \b
    Examples:
      finemoe train recipes/tiny.toml
      finemoe train recipes/tiny.toml --out runs/wide \\
        --set model.hidden_size=128 --set training.tokens=200_000

    The directory then holds config.json, metrics.jsonl, checkpoints/ and summary.json.
    """
    check_recipe(recipe, overrides or ())

    from finemoe.runs import run

    report_run(run.train(recipe, out=out, overrides=overrides or (), quiet=quiet), as_json)
