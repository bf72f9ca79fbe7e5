"""`finemoe resume`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from finemoe.cli.completion import complete_resumable
from finemoe.cli.output import Json, Quiet, report_run
from finemoe.core.errors import ConfigError

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change what is yet to come, such as the length; repeatable."),
]


def resume(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="The directory of a run, or of a comparison.",
            show_default=False,
            autocompletion=complete_resumable,
        ),
    ],
    changes: Changes = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted run, or train one longer.

    It continues from its newest undamaged checkpoint, with the configuration it began with. Of a
    comparison, every run that is not finished goes on, and the report is made again. Stages of a
    recipe go on all together by the command that began them, `finemoe train`.

    With --set training.tokens=N (or training.steps, training.max_tokens) a run goes on to another
    length, finished or not. From there on the schedule is that of the new length: a run that had
    decayed its learning rate raises it again. --set may also change schedule, learning rate,
    kernels, and how often a run is measured and saved; what the steps so far were trained on, and
    with, is refused.

    \b
    Examples:
      finemoe resume runs/tiny-20250131-101500
      finemoe resume runs/tiny --set training.tokens=4_000_000
      finemoe resume runs/demo
    """
    from finemoe.checkpoint.kinds import COMPARISON
    from finemoe.training.directory import require_run

    if (directory / COMPARISON).is_file():
        _comparison(directory, changes, quiet, as_json)
        return
    require_run(directory)  # before a second of imports

    from finemoe.runs import run

    report_run(run.resume(directory, overrides=changes or (), quiet=quiet), as_json)


def _comparison(directory: Path, changes: list[str] | None, quiet: bool, as_json: bool) -> None:
    if changes:
        raise ConfigError(
            f"{directory} is a comparison, whose runs are alike but for one thing: --set is for a single run. "
            "`finemoe compare` with another --out begins a longer one"
        )

    from finemoe.cli.compare import report_comparison
    from finemoe.studies.compare import go_on

    report_comparison(go_on(directory, quiet=quiet), as_json, f"finemoe resume {shlex.quote(str(directory))}")
