"""`finemoe show`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.completion import complete_resumable
from finemoe.cli.output import (
    IN_NATS,
    Json,
    measured_keys,
    plain_table,
    print_json,
    print_rich,
    title_of,
    training_loss,
)


def show(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Run directories; a comparison, or a folder of stages, stands for its runs.",
            show_default=False,
            autocompletion=complete_resumable,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write a page of one run, finished or not, here.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="With --out: write the page again while the run trains; Ctrl-C ends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put runs side by side: loss, speed, cache, balance.

    With --out, a page of one run that works offline: loss, balance and load of its experts,
    alerts, speed, a few texts it writes, configuration. With --follow the page is written every
    15 seconds until the run ends or is stopped; a browser that has it open shows the newest.

    MaxVio is (largest load - mean load) / mean load of an MoE layer's experts over the validation
    text: 0 is even. A run that is not finished shows how far it came and what it measured last.
    `finemoe runs` lists a folder; `finemoe compare` is the verb for a fair comparison with
    intervals.

    \b
    Examples:
      finemoe show runs/v1 runs/v2 runs/v3
      finemoe show runs/demo
      finemoe show runs/* --json
      finemoe show runs/tiny --out page
      finemoe train recipes/tiny.toml --out runs/tiny &
      finemoe show runs/tiny --out page --follow
    """
    if out is not None or follow:
        _write_page(directories, out, follow, as_json)
        return
    runs = {str(run): _summary(run) for run in _runs(directories)}
    if as_json:
        print_json([{"directory": name, **summary} for name, summary in runs.items()])
    else:
        _print_table(runs)


def _write_page(directories: list[Path], out: Path | None, follow: bool, as_json: bool) -> None:
    from finemoe.core.errors import ConfigError
    from finemoe.runs.report import REFRESH, run_report

    if out is None:
        raise ConfigError("--follow keeps a page up to date and needs to know where it is: add --out FOLDER")
    if len(directories) > 1:
        raise ConfigError(f"--out writes the page of one run, and {len(directories)} were given: name one")
    page = out / "report.html"
    if follow:
        typer.echo(f"Open {page} in a browser; it is written every {REFRESH} seconds. Ctrl-C ends it.", err=True)
    results = run_report(directories[0], out=out, follow=follow)
    if as_json:
        print_json(results)
    else:
        typer.echo(f"Open  {page} in a browser; it works offline\nData  {out / 'results.json'}")


def _runs(directories: Sequence[Path]) -> list[Path]:
    """The runs that are asked for, those of comparisons and stages too; of several paths, what is none is left out.

    Raises:
        RunError: there is none at all, or the only path is none.
    """
    from finemoe.checkpoint.kinds import CONFIG, models_below, stages_below
    from finemoe.core.errors import RunError
    from finemoe.core.logs import logger
    from finemoe.runs.listing import describe, runs_of
    from finemoe.training.directory import require_run

    found: list[Path] = []
    for directory in directories:
        known = describe(directory)
        if known is not None and known.kind in ("comparison", "paper"):
            found += runs_of(directory)
        elif known is not None and known.kind == "run":
            found.append(directory)
        elif stages := stages_below(directory):
            found += [one for one in stages if (one / CONFIG).is_file()]
        elif len(directories) > 1 and directory.exists():
            logger.warning("%s is left out: it is not a run directory", directory)
        else:
            if models_below(directory):
                require_run(directory)  # which names them
            raise RunError(f"{directory}: not a run directory; `finemoe runs` lists what there is")
    if not found:
        raise RunError(f"{', '.join(map(str, directories))}: no run was begun there yet")
    return list(dict.fromkeys(found))


def _summary(directory: Path) -> dict[str, Any]:
    """summary.json, with the state of the run; of a run that is not finished what its metrics say.

    Raises:
        RunError: summary.json cannot be read.
    """
    from finemoe.runs.listing import look_at, newest_records
    from finemoe.training.directory import read_summary

    info = look_at(directory)
    state = {"state": info.state, "steps": info.done, "planned_steps": info.planned}
    summary = read_summary(directory)
    if summary is not None:
        return {**state, **summary}
    step, validation = newest_records(directory / "metrics.jsonl")
    figures = ("tokens", "seconds", "tokens_per_second")
    measured = {
        key: value for key, value in validation.items()
        if (key.startswith("validation_") or key.endswith(("loss", "accuracy"))) and isinstance(value, (int, float))
    }  # fmt: skip
    return {
        **state,
        **{f"final_{key}": value for key, value in measured.items()},
        **{key: validation[key] for key in ("bits_per_byte", "max_vio", "dead_experts") if key in validation},
        "final_training_loss": step.get("loss"),
        **{key: step[key] for key in figures if key in step},
        **_size(directory),
    }


def _size(directory: Path) -> dict[str, int]:
    """Parameters of a run that is not finished, from its configuration; nothing where that cannot be read."""
    from finemoe.core.errors import FinemoeError
    from finemoe.model.config import ModelConfig
    from finemoe.model.size import measure
    from finemoe.training.directory import read_if_there

    with contextlib.suppress(FinemoeError, LookupError, TypeError, ValueError):
        found = read_if_there(directory / "config.json") or {}
        size = measure(ModelConfig.model_validate(found["model"]), 1)  # parameters are those of any length
        return {
            "total_parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "cache_elements_per_token": size.cache_elements_per_token,
        }
    return {}


def _print_table(runs: dict[str, dict[str, Any]]) -> None:
    from rich.text import Text

    from finemoe.charts.numbers import count, duration, fixed

    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("State", lambda s: s["state"]),
        ("Steps", _steps),
        *((title_of(key) + ", nats" * (key in IN_NATS), _measured(key)) for key in _measured_keys(runs)),
        ("Bits per byte", lambda s: fixed(s.get("bits_per_byte"), 4)),
        ("Training loss", lambda s: fixed(training_loss(s), 4)),
        ("Tokens", lambda s: count(s["tokens"])),
        ("Time", lambda s: duration(s["seconds"])),
        ("Tokens per second", lambda s: count(s["tokens_per_second"])),
        ("Parameters, total", lambda s: count(s["total_parameters"])),
        ("Parameters, active", lambda s: count(s["active_parameters"])),
        ("Training FLOPs", lambda s: f"{s['training_flops']:.3g}"),
        ("Peak memory", lambda s: f"{s['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("Cache per token, bf16", lambda s: _bytes(s.get("cache_elements_per_token"))),
        ("MaxVio, mean of layers", lambda s: fixed(s.get("max_vio"), 2)),
        ("Dead experts", lambda s: _share(s.get("dead_experts"))),
    ]
    layers = sorted({layer for s in runs.values() for layer in s.get("max_vio_per_layer", {})}, key=int)
    rows[-1:-1] = [(f"MaxVio, layer {layer}", _max_vio_of(layer)) for layer in layers]
    table = plain_table((0, 1))
    table.add_column("", no_wrap=True)
    for name in runs:
        table.add_column(Text(name), justify="right", overflow="fold")
    for title, cell in rows:
        table.add_row(title, *(_shown(name, summary, cell) for name, summary in runs.items()))
    print_rich(table)


def _steps(summary: dict[str, Any]) -> str:
    done, planned = summary["steps"], summary["planned_steps"]
    return f"{done:,}" if planned in (None, done) else f"{done:,} of {planned:,}"


def _measured_keys(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the last measurements of the runs found, whatever they were trained for."""
    found = dict.fromkeys(key for summary in runs.values() for key in measured_keys(summary))
    return list(found) or ["final_validation_loss"]


def _measured(key: str) -> Callable[[dict[str, Any]], str]:
    """A cell of one figure; a run that measures others leaves it empty, one that measured nothing is damaged."""
    from finemoe.charts.numbers import fixed

    return lambda summary: fixed(summary.get(key) if measured_keys(summary) else summary[key], 4)


def _shown(name: str, summary: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    """One cell.

    Raises:
        RunError: a figure that every run records is missing, or is none.
    """
    from finemoe.charts.numbers import NOTHING
    from finemoe.core.errors import RunError

    try:
        return cell(summary)
    except (KeyError, TypeError, ValueError) as error:
        if not (Path(name) / "summary.json").exists():  # of a run that goes on not everything is known
            return NOTHING
        raise RunError(f"{name}/summary.json: damaged, or not of a run ({error}); leave that run out") from error


def _max_vio_of(layer: str) -> Callable[[dict[str, Any]], str]:
    from finemoe.charts.numbers import fixed

    return lambda summary: fixed(summary.get("max_vio_per_layer", {}).get(layer), 2)


def _bytes(elements: int | None) -> str:
    """Two bytes an element; runs of earlier versions did not record it."""
    return "-" if elements is None else f"{2 * elements:,} B"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
