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

    A recipe is a TOML file; the smallest names a preset and a number of tokens. The config.json
    of a run is one too, and computes the same again. Ctrl-C, `kill` and a terminal that is closed
    save and stop; `finemoe resume` goes on where it stopped, bit for bit. Under nohup, or when
    nobody reads its output any more, a run goes on in silence. A run is saved four times, and
    every ten minutes.

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
