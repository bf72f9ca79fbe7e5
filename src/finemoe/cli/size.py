"""`finemoe size`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.output import Json, print_json, print_rich

if TYPE_CHECKING:
    from finemoe.model.size import ModelSize


def size(
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME|RECIPE|DIR...", help="Preset, .toml recipe or run directory.", show_default=False),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=1, metavar="N", help="Tokens per sequence; default: as in training."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count parameters, FLOPs and cache of a model.

    From the configuration alone: nothing is allocated, so the largest preset takes no longer
    than the smallest. Several models stand side by side. FLOPs are forward and backward, 6 for
    each active weight, attention without the causal saving; per sequence in the papers'
    convention, per token as built.

    \b
    Examples:
      finemoe size deepseek-moe-16b deepseek-llm-7b
      finemoe size deepseek-moe-145b --seq-len 4096 --json
      finemoe size recipes/tiny.toml
    """
    sizes = {name: _measure(name, seq_len) for name in models}
    if as_json:
        records = [{"name": name, **measured.to_dict()} for name, measured in sizes.items()]
        print_json(records[0] if len(models) == 1 else records)
    else:
        _print_table(sizes)


def _measure(name: str, seq_len: int | None) -> ModelSize:
    """A preset by name; else what lies at that path.

    Raises:
        ConfigError: none of these, or not a valid model.
    """
    from finemoe.core.config import did_you_mean
    from finemoe.core.errors import ConfigError
    from finemoe.model.presets import PRESETS

    path = Path(name)
    if name in PRESETS:
        return _measure_table({"preset": name}, name, seq_len or PRESETS[name].seq_len)
    if path.is_dir():
        return _measure_run(path, seq_len)
    if path.suffix == ".toml" or path.exists():
        return _measure_recipe(path, seq_len)
    raise ConfigError(
        f"{name}: neither a recipe, nor a run directory, nor a preset{did_you_mean(name, sorted(PRESETS))}"
    )


def _measure_table(table: dict[str, Any], source: str, seq_len: int) -> ModelSize:
    """The size of a `[model]` table. A preset's published widths count only where nothing was changed."""
    from finemoe.core.config import parse
    from finemoe.model.config import ModelConfig, expand
    from finemoe.model.presets import PRESETS, resolve
    from finemoe.model.size import measure

    if "blocks" in table:
        return measure(parse(ModelConfig, table, source), seq_len)
    config = expand(resolve(table, source))
    if "preset" in table:
        preset = PRESETS[table["preset"]]
        if config == expand(resolve(preset.model, source)):
            return measure(config, seq_len, preset.unrounded, preset.notes)
    return measure(config, seq_len)


def _measure_recipe(path: Path, seq_len: int | None) -> ModelSize:
    from finemoe.core.config import read_toml

    return _measure_file(read_toml(path), path, seq_len)


def _measure_run(directory: Path, seq_len: int | None) -> ModelSize:
    from finemoe.core.errors import RunError

    path = directory / "config.json"
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{directory}: not a run directory (no config.json)") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: unreadable: {error}") from error
    return _measure_file(recipe if isinstance(recipe, dict) else {}, path, seq_len)


def _measure_file(recipe: dict[str, Any], path: Path, seq_len: int | None) -> ModelSize:
    from finemoe.core.errors import ConfigError

    model, data = recipe.get("model"), recipe.get("data", {})
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise ConfigError(f'{path}: no [model] table; the smallest is [model] with preset = "tiny-moe"')
    length = seq_len or data.get("sequence_length")
    if length is None:
        from finemoe.data import DataConfig

        length = DataConfig().sequence_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(f"{path}: `data.sequence_length`: must be a whole number above 0 (got {length!r})")
    return _measure_table(model, f"{path}: model", length)


def _print_table(sizes: dict[str, ModelSize]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from finemoe.charts.numbers import count

    rows: list[tuple[str, Callable[[ModelSize], str]]] = [
        ("Parameters, total", lambda s: count(s.total_parameters)),
        ("Parameters, active", lambda s: count(s.active_parameters)),
        ("Expert parameters, total", lambda s: count(s.expert_parameters)),
        ("Expert parameters, active", lambda s: count(s.active_expert_parameters)),
        ("Sequence length", lambda s: f"{s.seq_len:,}"),
        ("Training FLOPs per token", lambda s: flops(s.training_flops_per_token)),
        ("Training FLOPs per sequence", lambda s: flops(s.training_flops_per_sequence)),
        ("Cache per token, elements", lambda s: f"{s.cache_elements_per_token:,}"),
        ("Cache per token, bf16", lambda s: f"{s.cache_elements_per_token * 2 / 2**10:,.4g} KiB"),
        ("Weights, bf16", lambda s: weights(s.total_parameters * 2)),
        ("Weights, fp32", lambda s: weights(s.total_parameters * 4)),
    ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for name in sizes:
        table.add_column(Text(name), justify="right", overflow="fold")
    for title, show in rows:
        table.add_row(title, *(show(measured) for measured in sizes.values()))
    notes = [Text(f"{name}: {note}") for name, measured in sizes.items() for note in measured.notes]
    print_rich(table, *([Text()] if notes else []), *notes)


def flops(value: float) -> str:
    """4.316 T, with the SI prefixes M, G, T and P, in which the papers print them."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value / 1e6:.4g} M"


def weights(num_bytes: int) -> str:
    """30.5 GiB, or MiB below a tenth of one."""
    gib = num_bytes / 2**30
    return f"{gib:,.3g} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"
