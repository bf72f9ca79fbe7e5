"""`finemoe resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.output import Json, Quiet, report_run


def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.", show_default=False)],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with a run that was interrupted.

    It continues from its newest undamaged checkpoint, with the configuration it began with.

    \b
    Example:
      finemoe resume runs/tiny-20250131-101500
    """
    from finemoe.training.directory import require_run

    require_run(directory)  # before a second of imports

    from finemoe.runs import run

    report_run(run.resume(directory, quiet=quiet), as_json)
