"""`finemoe presets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import Json, print_json, print_rich

if TYPE_CHECKING:
    from finemoe.model.config import ModelConfig


def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one's table.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the named models, or print one as a recipe's [model] table.

    \b
    Examples:
      finemoe presets
      finemoe presets tiny-moe > recipe.toml

    In a recipe `preset = "tiny-moe"` does the same, and further keys of [model] override it.
    """
    if name is None:
        _list(as_json)
    else:
        _show(name, as_json)


def _list(as_json: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from finemoe.charts.numbers import count
    from finemoe.model.config import expand
    from finemoe.model.presets import PRESETS, resolve
    from finemoe.model.size import measure

    records: list[dict[str, Any]] = []
    for name, preset in PRESETS.items():
        config = expand(resolve(preset.model, name))
        size = measure(config, preset.seq_len)
        records.append(
            {
                "name": name,
                "total_parameters": size.total_parameters,
                "active_parameters": size.active_parameters,
                "experts": experts(config),
                "seq_len": preset.seq_len,
                "summary": preset.summary,
            }
        )
    if as_json:
        print_json(records)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("Name", no_wrap=True)
    table.add_column("Total", justify="right", no_wrap=True)
    table.add_column("Active", justify="right", no_wrap=True)
    table.add_column("Experts", no_wrap=True)
    table.add_column("What")
    for record in records:
        total, active = count(record["total_parameters"]), count(record["active_parameters"])
        table.add_row(record["name"], total, active, record["experts"], record["summary"])
    print_rich(table)
    typer.echo("\nExperts: shared + routed, and how many routed ones a token takes.")
    typer.echo("finemoe size NAME measures one; finemoe presets NAME prints it for a recipe.")


def experts(config: ModelConfig) -> str:
    """`1+63 top 7`, of the last layer; a dash for a dense model."""
    from finemoe.model.moe.layer import MoEConfig

    layer = config.blocks[-1].feed_forward
    if not isinstance(layer, MoEConfig):
        return "–"
    shared = f"{layer.num_shared_experts}+" if layer.num_shared_experts else ""
    return f"{shared}{layer.num_routed_experts} top {layer.experts_per_token}"


def _show(name: str, as_json: bool) -> None:
    from finemoe.model.presets import find_preset

    preset = find_preset(name)
    if as_json:
        about = {"name": name, "summary": preset.summary, "seq_len": preset.seq_len, "notes": preset.notes}
        print_json({**about, "model": preset.model})
        return
    typer.echo(f"# {name}: {preset.summary}; sequences of {preset.seq_len} tokens.")
    for note in preset.notes:
        typer.echo(f"# {note}")
    typer.echo("\n".join(toml_table("model", preset.model)))


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
