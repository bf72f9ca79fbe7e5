"""`finemoe verify-parallel`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finemoe.cli.completion import complete_recipe
from finemoe.cli.output import Json, Overrides, check_recipe, number_table, print_json, print_rich

if TYPE_CHECKING:
    from finemoe.runs.planning.layouts import LayoutCheck


def verify_parallel(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A TOML recipe.", show_default=False, autocompletion=complete_recipe),
    ],
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-n", min=2, metavar="N", help="At most; default: one a core.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Of each run.")] = 4,
    as_json: Json = False,
) -> None:
    """Check that many processes train what one would.

    Trains a few steps of a recipe by one process, and by every layout of processes that fits on
    this machine, with torchrun; then compares losses, gradient norms, the load of every expert,
    and weights. All of it is in float64, where rounding is next to nothing: a loss, a norm or a
    weight that differs by more than 1e-9, or one choice of an expert that differs, is an error of
    the layout, and the verb ends with status 1. (In float32 right layouts part as well, after a
    step or two: near-ties of routers go one way or the other.) What a bug of a layout would cost is
    a run of weeks whose curve looks fine. The layout of the recipe's own [parallel] is run as well
    where --processes are enough for it; where they are not, that is said.

    \b
    Examples:
      finemoe verify-parallel recipes/ladder/v3.toml
      finemoe verify-parallel recipes/tiny.toml --processes 4 --steps 2
    """
    check_recipe(recipe, overrides or ())

    from finemoe.runs.planning.layouts import verify_parallel as verify

    found = verify(recipe, processes=processes, steps=steps, overrides=overrides or ())
    if as_json:
        print_json([one.to_dict() for one in found])
    else:
        columns = ("Layout", "Loss", "Norm", "Weights", "Loads", "s/step", "")
        print_rich(number_table(columns, [_row(one) for one in found]))
        for one in found:
            if one.loads_apart is not None:
                typer.echo(f"\n{one.layout}: experts took other tokens: {one.loads_apart}")
            if one.failure is not None:
                typer.echo(f"\n{one.layout} did not come to its end: {one.failure}")
    if not all(one.agrees for one in found):
        raise typer.Exit(1)


def _row(found: LayoutCheck) -> tuple[str, ...]:
    def near(value: float | None) -> str:
        return "-" if value is None else f"{value:.0e}" if value else "0"

    loads = {None: "-", True: "equal", False: "differ"}[found.loads_equal]
    seconds = "-" if found.seconds_per_step is None else f"{found.seconds_per_step:.2f}"
    figures = (near(found.loss), near(found.gradient_norm), near(found.weights), loads, seconds)
    name = f"{found.layout} (the recipe's)" if found.own else found.layout
    return (name, *figures, "agrees" if found.agrees else "DIFFERS")
