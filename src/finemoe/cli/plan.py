"""`finemoe plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.completion import complete_model
from finemoe.cli.output import Json, deliver, number_table, print_rich

_Model = Annotated[
    str,
    typer.Argument(
        metavar="NAME|RECIPE|PATH", help="As of `finemoe size`.", show_default=False, autocompletion=complete_model
    ),
]
_Gpus = Annotated[int, typer.Option("--gpus", metavar="N", help="Devices, a process each.")]
_Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="a100 h100 h800 h200 b200 b300 gb200 gb300; or here.")
]
_Step = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-step",
        min=1,
        metavar="N",
        help="Default: the recipe's; of a model alone 8 micro-batches a device.",
    ),
]
_Micro = Annotated[
    int | None,
    typer.Option(
        "--micro-batch", min=1, metavar="N", help="Sequences of a device at once. Default: the recipe's; else 1."
    ),
]
_Length = Annotated[
    int | None, typer.Option("--seq-len", min=1, metavar="N", help="Tokens per sequence; default: as in training.")
]
_Tokens = Annotated[
    str | None, typer.Option("--tokens", metavar="N", help="Of the whole run, for device-hours: 14.8T, 300B.")
]
_Precision = Annotated[str | None, typer.Option("--precision", metavar="P", help="fp32, bf16 (default) or fp8.")]
_Recompute = Annotated[
    bool | None, typer.Option("--recompute/--no-recompute", help="Run blocks forward twice, and keep little.")
]
_Gather = Annotated[
    str, typer.Option("--gather", metavar="WHEN", help="Weights: each micro_batch, as finemoe does, or once a step.")
]
_Calibration = Annotated[
    str, typer.Option("--calibration", metavar="NAME", help="torch, tuned or deepseek-v3: whose times.")
]
_Layout = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Such as parallel.expert=64; of a recipe any key; repeatable."),
]
_Stage = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="Of a recipe with stages; default: the first that trains."),
]
_Search = Annotated[bool, typer.Option("--search", help="Rank the layouts that fit and that finemoe trains by.")]
_Report = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for a page with figures.")]
_CHOICES = {
    "--precision": ("fp32", "bf16", "fp8"),
    "--gather": ("micro_batch", "step"),
    "--calibration": ("torch", "tuned", "deepseek-v3"),
}


def plan(
    model: _Model,
    gpus: _Gpus,
    device: _Device = "h100",
    stage: _Stage = None,
    tokens_per_step: _Step = None,
    micro_batch: _Micro = None,
    seq_len: _Length = None,
    tokens: _Tokens = None,
    precision: _Precision = None,
    recompute: _Recompute = None,
    gather: _Gather = "micro_batch",
    calibration: _Calibration = "torch",
    overrides: _Layout = None,
    search: _Search = False,
    out: _Report = None,
    as_json: Json = False,
) -> None:
    """Say what a run on many devices takes.

    From the configuration alone: memory of a rank at MaxVio 0 and 1, arithmetic, bytes that each
    exchange moves, bubble of the pipeline, time of a step and device-hours. Bytes and bubbles are
    counted; times come from constants that were fitted on half of the published runs, and each
    stands with the interval that the other half asks for. A recipe is planned as `finemoe train`
    would run it, batch and micro-batch included. A layout that does not fit is refused, and one
    that finemoe does not train by; with --calibration tuned or deepseek-v3, which is for others'
    software, the latter is planned and marked.

    \b
    Examples:
      finemoe plan deepseek-moe-16b --gpus 64 --device h100 --search
      finemoe plan deepseek-v3 --gpus 2048 --device h800 --precision fp8 \\
        --set parallel.pipeline=16 --set parallel.expert=64 \\
        --set parallel.schedule=dualpipev --gather step --recompute \\
        --calibration tuned --tokens 14.8T --out plan
      finemoe plan recipes/r1-zero.toml --gpus 1 --stage zero
      finemoe plan recipes/tiny.toml --gpus 2 --device here
    """
    _require_choices({"--precision": precision, "--gather": gather, "--calibration": calibration})
    budget = _tokens(tokens)

    from finemoe.runs.planning.distribution import plan as made

    options: dict[str, Any] = {"precision": precision, "gather": gather, "calibration": calibration}
    results = made(
        model, gpus, device, stage=stage, overrides=overrides or (), tokens_per_step=tokens_per_step,
        micro_batch=micro_batch, seq_len=seq_len, tokens=budget, recompute=recompute, search=search, out=out, **options,
    )  # fmt: skip
    deliver(results, out, as_json, _print)


def _require_choices(given: Mapping[str, str | None]) -> None:
    from finemoe.core.config import did_you_mean
    from finemoe.core.errors import ConfigError

    for option, value in given.items():
        known = _CHOICES[option]
        if value is not None and value not in known:
            raise ConfigError(f"{option} {value!r}: must be {', '.join(known)}{did_you_mean(value, list(known))}")


def _tokens(text: str | None) -> float | None:
    """`14.8T` or a number.

    Raises:
        ConfigError: neither.
    """
    from finemoe.core.errors import ConfigError

    if text is None:
        return None
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise ConfigError(f"--tokens {text!r}: write a number above 0, as 300B or 14.8T")
    return value


def _print(results: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.charts.numbers import count
    from finemoe.charts.plan.words import gib, moved, summary, took, uneven

    memory, parts = results["memory"], results["step"]["parts"]
    held = [
        [key.replace("_", " "), gib(memory["peak"][key]), gib(memory["uneven"][key])]
        for key in memory["peak"]
        if memory["uneven"][key]
    ]
    spent = [[key, took(value), f"{100 * value / parts['total']:.1f} %"] for key, value in parts.items() if value]
    exchanged = [
        [one["name"], str(one["group"]), f"{one['times']:,.0f}", moved(one["total"])] for one in results["exchanges"]
    ]
    ranked = [
        [row["layout"], took(row["seconds"]), count(row["tokens_per_second"]), gib(row["memory"]), uneven(row)]
        for row in results.get("search", {}).get("ranked", [])
    ]
    said: list[Any] = [*map(Text, summary(results)), ""]
    if ranked:
        print_rich(*said, number_table(("Layout", "Step", "Tokens/s", "MaxVio 0", "MaxVio 1"), ranked))
        typer.echo(f"\nThe first, for train, launch and plan:\n{results['search']['ranked'][0]['options']}\n")
        said = []
    said += [number_table(("Memory of a rank", "MaxVio 0", "MaxVio 1"), held), ""]
    said.append(number_table(("A step", "Time", "Share"), spent))
    if exchanged:
        said += ["", number_table(("Exchange", "Processes", "Times", "Bytes a step"), exchanged)]
    print_rich(*said)
