"""`finemoe recipe new`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.output import Json, Quiet, print_json


def new(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILES...", help="Your texts: files, folders or globs.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new file; default: print the recipe.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe for your files, with its reasons.

    Reads the files, measures a few steps on this machine, and chooses model, vocabulary,
    sequence length, budget, batch and threads. Nothing is asked and nothing overwritten; the
    recipe trains as it stands, and every line can be changed.

    \b
    Examples:
      finemoe recipe new book.txt --out book.toml
      finemoe recipe new "corpus/**/*.jsonl.gz" --out corpus.toml
      finemoe recipe new notes/ > notes.toml
    """
    from finemoe.core.errors import ConfigError

    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already and stays as it is; choose another --out")

    from finemoe.core.logs import console
    from finemoe.runs.planning.starter import describe, new_recipe

    made = new_recipe(paths, quiet=quiet)
    if out is not None:
        made.save(out)
    if as_json:
        print_json(describe(made))
    elif out is None:
        typer.echo(made.text, nl=False)
    name = shlex.quote(str(out)) if out is not None else "RECIPE"
    if not quiet:
        said = f"Next: finemoe train {name} --check, then finemoe train {name}"
        console().print(said, markup=False, highlight=False, soft_wrap=True)
