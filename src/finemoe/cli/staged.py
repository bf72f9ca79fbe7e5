"""`finemoe train --check` of a recipe with stages: each that can be looked at, and why the others cannot yet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from finemoe.cli.output import print_json


def check_stages(recipe: Path, overrides: Sequence[str], out: Path | None, quiet: bool, as_json: bool) -> None:
    """Say of every stage what it would take, or why nobody can say it yet; the keys of all are read first.

    Raises:
        typer.Exit: 1 when one would be refused.
        ConfigError: the recipe is none of stages, or one of them is no configuration.
    """
    from finemoe.core.config import read_tables
    from finemoe.runs.config import resolve_run
    from finemoe.runs.planning.check import check
    from finemoe.runs.planning.stages import NOWHERE, Stage, checked_stages, waits_for

    stages = checked_stages(read_tables(recipe), str(recipe), out or NOWHERE, overrides)

    def why_not(stage: Stage) -> str | None:
        if stage.sampling is not None:
            return "it writes answers and trains nothing"
        if stage.begun:
            return f"{stage.folder} holds it already; the command without --check goes on with it"
        if (before := waits_for(stage, stages)) is None:
            return None
        needs = f"its keys are right, but it begins with what stage {before.name} leaves"
        if out is None:
            return f"{needs}: say --out DIR too, where that was trained"
        return f"{needs}, and {before.folder} is not there: train that stage first"

    found: list[dict[str, Any]] = []
    refused = False
    for number, stage in enumerate(stages, 1):
        why = why_not(stage)
        if not as_json:
            typer.secho(f"Stage {number} of {len(stages)}: {stage.name}", bold=True)
        if why is not None:
            found.append({"stage": stage.name, "check": None, "why": why})
            said = textwrap.fill(f"Not checked: {why}.", 80, break_long_words=False, break_on_hyphens=False)
        else:
            config = resolve_run(dict(stage.raw), f"{recipe}, stage {stage.name}")
            one = check(config, out=stage.folder, quiet=quiet)
            found.append({"stage": stage.name, "check": one.to_dict(), "why": None})
            refused, said = refused or bool(one.refused), str(one)
        if not as_json:
            typer.echo(f"{said}\n")
    if as_json:
        print_json({"stages": found})
    if refused:
        raise typer.Exit(1)
