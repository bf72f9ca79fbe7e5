"""`finemoe presets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.completion import complete_preset
from finemoe.cli.output import Json, print_json, print_rich

if TYPE_CHECKING:
    from rich.table import Table

    from finemoe.model.config import ModelConfig
    from finemoe.model.presets import Preset

_TOKENS, _TOKENS_PER_STEP = 1_000_000, 8192  # the latter by default
_TUNED_HIDDEN = 64  # where the default learning rate was tuned; wider models want less


def presets(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Print this one's table.", show_default=False, autocompletion=complete_preset
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="TEXT", help="List those whose name or group contains TEXT.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the named models, or print one as a recipe.

    \b
    Examples:
      finemoe presets
      finemoe presets --only tiny
      finemoe presets tiny-moe > recipe.toml
      finemoe train recipe.toml

    The recipe learns from the standard library of Python until data.corpus says otherwise.
    In a recipe `preset = "tiny-moe"` does the same, and further keys of [model] override it.
    """
    from finemoe.core.errors import ConfigError

    if name is not None and only is not None:
        raise ConfigError(f"--only {only!r} narrows the list, and {name} asks for one preset: give one of them")
    if name is None:
        _list(only or "", as_json)
    else:
        _show(name, as_json)


def _list(only: str, as_json: bool) -> None:
    from finemoe.core.errors import ConfigError
    from finemoe.model.presets import GROUPS

    wanted = only.casefold()
    records = [
        _record(title, name, preset)
        for title, group in GROUPS.items()
        for name, preset in group.items()
        if wanted in name.casefold() or wanted in title.casefold()
    ]
    if not records:
        raise ConfigError(f"--only {only!r}: no preset and no group has it in its name; groups: {'; '.join(GROUPS)}")
    if as_json:
        print_json(records)
    else:
        _print_groups(records)


def _record(title: str, name: str, preset: Preset) -> dict[str, Any]:
    from finemoe.checkpoint.portability import portability
    from finemoe.model.config import expand
    from finemoe.model.presets import resolve
    from finemoe.model.size import measure

    config = expand(resolve(preset.model, name))
    where = portability(config)
    size = measure(config, preset.seq_len)
    return {
        "name": name,
        "group": title,
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "experts": experts(config),
        "transformers": where.native,
        "llama_cpp": where.architecture is not None,
        "runs_in": where.short,
        "seq_len": preset.seq_len,
        "summary": preset.summary,
    }


def _print_groups(records: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from finemoe.charts.numbers import count

    heads = ("Name", "Total", "Active", "Experts", "In", "What")
    rows = {
        record["name"]: (
            record["name"],
            count(record["total_parameters"]),
            count(record["active_parameters"]),
            record["experts"],
            record["runs_in"],
            record["summary"],
        )
        for record in records
    }
    widths = [max(len(row[column]) for row in (heads, *rows.values())) for column in range(5)]
    print_rich(_table([heads], widths))
    for title, group in groupby(records, lambda record: record["group"]):
        print_rich(Text(), Text(title, style="bold"), _table([rows[record["name"]] for record in group], widths))
    typer.echo("\nExperts: shared + routed, and how many routed ones a token takes.")
    typer.echo("In: what runs its export, T transformers, L llama.cpp; – finemoe alone.")
    typer.echo("--only TEXT narrows the list; finemoe size NAME measures one;")
    typer.echo("finemoe presets NAME prints it for a recipe.")


def _table(rows: list[tuple[str, ...]], widths: list[int]) -> Table:
    """Rows under columns of equal widths, so that the tables of several groups read as one."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    for column, width in enumerate(widths):
        table.add_column(width=width, justify="right" if column in (1, 2) else "left", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def experts(config: ModelConfig) -> str:
    """`1+63 top 7`, of the last layer; a dash for a dense model."""
    from finemoe.model.moe.layer import MoEConfig

    layer = config.blocks[-1].feed_forward
    if not isinstance(layer, MoEConfig):
        return "–"
    shared = f"{layer.num_shared_experts}+" if layer.num_shared_experts else ""
    return f"{shared}{layer.num_routed_experts} top {layer.experts_per_token}"


def _show(name: str, as_json: bool) -> None:
    from finemoe.model.presets import find_preset, group_of

    preset = find_preset(name)
    if as_json:
        about = {
            "name": name,
            "group": group_of(name),
            "summary": preset.summary,
            "seq_len": preset.seq_len,
            "notes": preset.notes,
        }
        print_json({**about, "model": preset.model})
        return
    typer.echo(f"# {name}: {preset.summary} ({group_of(name)}); sequences of {preset.seq_len} tokens.")
    for note in preset.notes:
        typer.echo(f"# {note}")
    typer.echo("\n".join(toml_table("model", preset.model)))
    typer.echo("\n" + "\n".join(_rest_of_recipe(preset)))


def _rest_of_recipe(preset: Preset) -> Iterator[str]:
    """What a recipe needs besides its model: data cut as the model was made for, a length, a learning rate."""
    from finemoe.runs.config import DEFAULT_LEARNING_RATE

    rate = DEFAULT_LEARNING_RATE * (_TUNED_HIDDEN / preset.model["hidden_size"]) ** 0.5
    yield from ("[data]", f"sequence_length = {preset.seq_len}")
    yield '# corpus = { kind = "files", paths = ["my-texts/"] }  # without it, the standard library of Python'
    yield from ("", "[training]", f"tokens = {_TOKENS:_}  # a first look; longer is better")
    if _TOKENS_PER_STEP % preset.seq_len:
        yield f"tokens_per_step = {preset.seq_len}"
    yield from ("", "[optimizer]", f"learning_rate = {rate:.1g}")


def toml_table(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    """Lines of TOML: plain values first, then the tables within, each under its full name."""
    yield f"[{name}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{key} = {json.dumps(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield ""
            yield from toml_table(f"{name}.{key}", value)
