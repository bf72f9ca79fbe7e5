"""`finemoe data`: what a recipe trains on, before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.completion import complete_recipe
from finemoe.cli.output import Json, check_recipe, print_json, print_rich
from finemoe.core.errors import ConfigError

data = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Show what a recipe trains on, and what of it is learnt.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)


@data.callback()
def about() -> None:
    """Show what a recipe trains on, and what of it is learnt."""


@data.command()
def show(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="TOML file, or the config.json of a run.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many to show.")] = 4,
    skip: Annotated[int, typer.Option("--skip", min=0, help="Pass over so many of the first.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for a page with them: report.html, results.json.", show_default=False),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage", metavar="NAME", help="Which, of a recipe with stages; else the first.", show_default=False
        ),
    ] = None,
    stages_in: Annotated[
        Path | None,
        typer.Option(
            "--in", metavar="DIR", help="Where its stages are trained: the --out of train.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print samples of what is trained on, with the learnt tokens in colour.

    They come in the order of training, as the model reads them. Where there is no colour, what is
    learnt stands in [[double brackets]]. Below them: what was read, cut and left out, and why. Of
    a method whose model learns from its own answers, such as grpo, prompts are shown as they are
    asked, with what would be right.

    \b
    Examples:
      finemoe data show sft.toml
      finemoe data show recipes/r1-zero.toml --stage zero --in runs/r1-zero
      finemoe data show sft.toml -n 20 --out samples --json | jq '.report.skipped'
    """
    from finemoe.charts.data.page import data_page, figures
    from finemoe.charts.report import require_report_folder, write_report
    from finemoe.runs.excerpts import KIND

    folder, changes = require_report_folder(out, KIND), overrides or ()
    results = _excerpts(recipe, stage, stages_in, changes, samples, skip)
    if folder is not None:
        write_report(folder, results, data_page, figures)
    if as_json:
        print_json(results)
        return
    _print(results)
    if folder is not None:
        typer.echo(f"\nPage: {folder / 'report.html'}")


def _excerpts(
    recipe: Path, stage: str | None, stages_in: Path | None, overrides: Sequence[str], samples: int, skip: int
) -> dict[str, Any]:
    """Of the recipe, or of one of its stages, which is told then.

    Raises:
        ConfigError: a stage of a recipe that has none, or that cannot be looked at yet.
    """
    from finemoe.runs.excerpts import data_excerpts

    if "stage" in check_recipe(recipe, overrides):
        from finemoe.runs.planning.stages import stage_config

        config, said = stage_config(recipe, stage=stage, out=stages_in, overrides=overrides)
        found = data_excerpts(config, samples=samples, skip=skip)
        return {**found, "notes": [said, *found["notes"]]}
    if stage is not None or stages_in is not None:
        raise ConfigError(f"{recipe} has no stages: leave --stage and --in out")
    return data_excerpts(recipe, samples=samples, skip=skip, overrides=overrides)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from finemoe.charts.data.words import counted, title_of

    colour = Console().color_system is not None
    for sample in results["samples"]:
        print_rich(Text(title_of(sample), "bold"))
        asked = "right" in sample
        text = Text()
        for piece in sample["pieces"]:
            if not piece["learnt"]:
                text.append(piece["text"], "" if asked else "dim")
            else:
                text.append(piece["text"] if colour else f"[[{piece['text']}]]", "green")
        print_rich(text, Text())
    for line in counted(results):
        print_rich(Text(line))
