"""`finemoe recipe`: the keys of recipes, and a first recipe for one's own files."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from finemoe.cli.completion import complete_section
from finemoe.cli.output import Json, print_json
from finemoe.cli.starter import new

if TYPE_CHECKING:
    from finemoe.core.keys import Key

recipe = typer.Typer(
    name="recipe",
    no_args_is_help=True,
    help="Write recipes: every key, a first one for your files.",
    rich_markup_mode=None,
)


@recipe.command()
def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION",
            help="A table, a kind of one, or a key: training, muon, learning_rate.",
            show_default=False,
            autocompletion=complete_section,
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/reference/recipe.md, made from the same source.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the keys of a recipe: type, unit, default and meaning.

    Without SECTION all of them, those of `finemoe train` first, then what `finemoe compare`
    adds. Any key can also be given as --set KEY=VALUE.

    \b
    Examples:
      finemoe recipe keys training
      finemoe recipe keys model.attention
      finemoe recipe keys muon
      finemoe recipe keys | grep learning_rate
    """
    from finemoe.core.errors import ConfigError

    if markdown and (section is not None or as_json):
        raise ConfigError("--markdown prints the whole page: leave SECTION and --json out")

    from finemoe.studies import keys as known

    if markdown:
        typer.echo(known.markdown(), nl=False)
        return
    chosen = known.chosen_sections(section)
    if as_json:
        print_json(
            [
                {"recipe": root, "table": one.name, "kind": one.kind, **key.to_dict()}
                for root, one in chosen
                for key in one.keys
            ]
        )
        return
    width = max(40, min(shutil.get_terminal_size((80, 24)).columns, 120))
    for root, one in chosen:
        typer.echo(known.heading(root, one))
        typer.echo(textwrap.fill(one.meaning, width, initial_indent="  ", subsequent_indent="  "))
        typer.echo()
        for key in one.keys:
            typer.echo("\n".join(_lines(key, width)))
            typer.echo()


def _lines(key: Key, width: int) -> list[str]:
    """The key with its default on one line, so that grep finds both; type, unit and meaning below it."""
    unit = f"; unit: {key.unit}" if key.unit else ""
    about = f"{key.type}{unit}. {key.meaning}"
    return [
        f"{key.name} = {key.default}",
        *textwrap.wrap(about, width, initial_indent="    ", subsequent_indent="    "),
    ]


recipe.command()(new)
