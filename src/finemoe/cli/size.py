"""`finemoe size`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.completion import complete_model
from finemoe.cli.output import Json, plain_table, print_json, print_rich

if TYPE_CHECKING:
    from finemoe.model.size import ModelSize


@dataclass(frozen=True)
class _Sized:
    """One column of the table."""

    name: str
    size: ModelSize
    cache_bits: float
    cache_against_first: float
    """Bytes of the cache, as a share of the first model's."""

    @property
    def cache_bytes_per_token(self) -> float:
        return self.size.cache_elements_per_token * self.cache_bits / 8

    def to_dict(self) -> dict[str, Any]:
        cache = {
            "cache_bits": self.cache_bits,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "cache_against_first": self.cache_against_first,
        }
        return {"name": self.name, **self.size.to_dict(), **cache}


def size(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|RECIPE|PATH...",
            help="Preset, .toml recipe, run, imported or Hugging Face folder, config.json, GGUF file.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=1, metavar="N", help="Tokens per sequence; default: as in training."),
    ] = None,
    cache_bits: Annotated[
        str,
        typer.Option(
            "--cache-bits", metavar="B,...", help="Bits of a cached element: one for all models, or each its."
        ),
    ] = "16",
    as_json: Json = False,
) -> None:
    """Count parameters, FLOPs and cache of a model.

    From the configuration alone: nothing is allocated, so the largest preset takes no longer
    than the smallest, and of a checkpoint its config.json is enough, or the header of its GGUF
    file: ask before you download. Several models stand side by side, and their caches are
    compared with the first one's. FLOPs are forward and backward, 6 for each active weight,
    attention without the causal saving; per sequence in the papers' convention, per token as built.

    \b
    Examples:
      finemoe size deepseek-moe-16b deepseek-llm-7b
      finemoe size deepseek-moe-145b --seq-len 4096 --json
      finemoe size deepseek-llm-67b deepseek-v2 --cache-bits 16,6
      finemoe size recipes/tiny.toml
      finemoe size DeepSeek-V3/config.json
    """
    from finemoe.core.config import read_toml

    bits = _bits(cache_bits, len(models))
    for name in models:
        if name.endswith(".toml"):
            read_toml(name)  # a recipe that cannot be read is told before a second of imports

    from finemoe.runs.planning.sizing import size as measure

    sizes = [measure(name, seq_len) for name in models]
    first = sizes[0].cache_elements_per_token * bits[0]
    columns = [
        _Sized(name, measured, width, measured.cache_elements_per_token * width / first)
        for name, measured, width in zip(models, sizes, bits, strict=True)
    ]
    if as_json:
        records = [column.to_dict() for column in columns]
        print_json(records[0] if len(models) == 1 else records)
    else:
        _print_table(columns)


def _bits(text: str, count: int) -> list[float]:
    """The widths of `--cache-bits`, one for each of `count` models.

    Raises:
        ConfigError: no numbers, or not as many as models.
    """
    from finemoe.core.errors import ConfigError

    try:
        bits = [float(part) for part in text.split(",")]
    except ValueError:
        bits = []
    if not bits or not all(0 < width <= 64 for width in bits):
        raise ConfigError(f"--cache-bits {text!r}: write numbers of bits above 0 and up to 64, as 16 or 16,6")
    if len(bits) not in (1, count):
        raise ConfigError(
            f"--cache-bits {text!r}: {len(bits)} widths, and {count} to measure; give one, or one for each"
        )
    return bits if len(bits) == count else bits * count


def _print_table(columns: list[_Sized]) -> None:
    from rich.text import Text

    table = plain_table((0, 1))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(Text(column.name), justify="right", overflow="fold")
    for title, show in _rows(columns):
        table.add_row(title, *map(show, columns))
    notes = dict.fromkeys(f"{column.name}: {note}" for column in columns for note in column.size.notes)
    print_rich(table, *([Text()] if notes else []), *map(Text, notes))


def _rows(columns: list[_Sized]) -> Iterator[tuple[str, Callable[[_Sized], str]]]:
    from finemoe.charts.numbers import NOTHING, count

    yield "Parameters, total", lambda c: count(c.size.total_parameters)
    yield "Parameters, active", lambda c: count(c.size.active_parameters)
    yield "  without input embedding", lambda c: count(c.size.active_parameters_without_embedding)
    if any(column.size.mtp_parameters for column in columns):
        yield (
            "Multi-token prediction",
            lambda c: f"+{count(c.size.mtp_parameters)}" if c.size.mtp_parameters else NOTHING,
        )
    yield "Expert parameters, total", lambda c: count(c.size.expert_parameters)
    yield "Expert parameters, active", lambda c: count(c.size.active_expert_parameters)
    yield "Sequence length", lambda c: f"{c.size.seq_len:,}"
    yield "Training FLOPs per token", lambda c: flops(c.size.training_flops_per_token)
    yield "Training FLOPs per sequence", lambda c: flops(c.size.training_flops_per_sequence)
    yield "Cache per token, elements", lambda c: f"{c.size.cache_elements_per_token:,}"
    yield "  bits each", lambda c: f"{c.cache_bits:g}"
    yield "Cache per token", lambda c: f"{c.cache_bytes_per_token / 2**10:,.4g} KiB"
    if len(columns) > 1:
        yield "  against the first", lambda c: NOTHING if c is columns[0] else change(c.cache_against_first)
    yield "Weights, bf16", lambda c: weights(c.size.total_parameters * 2)
    yield "Weights, fp32", lambda c: weights(c.size.total_parameters * 4)


def change(ratio: float) -> str:
    """-93.3 % of what was, or 2.5 times as much."""
    return f"{100 * (ratio - 1):+.1f} %" if ratio < 2 else f"{ratio:,.3g} times"


def flops(value: float) -> str:
    """4.316 T, with the SI prefixes M, G, T and P, in which the papers print them."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value / 1e6:.4g} M"


def weights(num_bytes: int) -> str:
    """30.5 GiB, or MiB below a tenth of one."""
    gib = num_bytes / 2**30
    if gib >= 999.5:
        return f"{gib:,.0f} GiB"
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"
