"""`finemoe analyze placement`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.output import Json, deliver, number_table, print_rich

_MOST_COPIES = 8
_Load = Annotated[Path, typer.Argument(metavar="LOAD", help="Folder of `finemoe analyze load MODEL --out LOAD`.")]


def placement(
    load: _Load,
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="Devices that hold the experts.")],
    redundant: Annotated[
        int, typer.Option("--redundant", min=0, metavar="R", help="Slots beyond one an expert, for copies.")
    ] = 0,
    groups: Annotated[int, typer.Option("--groups", min=1, metavar="G", help="Of the router; 1: none.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="The devices lie on.")] = 1,
    as_json: Json = False,
) -> None:
    """Place experts on devices, for serving.

    DeepSeek's load balancer (EPLB): experts that a recorded load asks for most get copies, and
    copies are packed onto devices so that all wait alike. Where --nodes divides --groups, groups
    stay on one node each. Told are the experts of every device and the largest load over the
    mean, before (experts in order, no copies) and after.

    \b
    Examples:
      finemoe analyze load runs/tiny --last --out load
      finemoe analyze placement load --gpus 8 --redundant 9
      finemoe analyze placement load --gpus 16 --groups 8 --nodes 2 --json
    """
    from finemoe.analysis.placement import placement as place

    results = place(load, gpus=gpus, redundant=redundant, groups=groups, nodes=nodes)
    deliver(results, None, as_json, _print)


def _print(results: Mapping[str, Any]) -> None:
    from finemoe.charts.numbers import fixed

    rows = []
    for number, layer in results["layers"].items():
        copied = sorted(((n, e) for e, n in enumerate(layer["copies"]) if n > 1), key=lambda pair: (-pair[0], pair[1]))
        told = ", ".join(f"{expert} x{count}" for count, expert in copied[:_MOST_COPIES])
        rows.append([f"Layer {number}", fixed(layer["before"], 2), fixed(layer["after"], 2), told or "none"])
    each = (len(next(iter(results["layers"].values()))["copies"]) + results["redundant"]) // results["gpus"]
    said = (
        f"{results['model']}: {each} experts on each of {results['gpus']} devices. Largest over mean load of a device, "
        f"mean of {len(rows)} layers: {fixed(results['before'], 2)} before, {fixed(results['after'], 2)} after."
    )
    print_rich(said, "", number_table(("", "Before", "After", "Copies"), rows))
