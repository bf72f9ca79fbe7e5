"""`finemoe train`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.completion import complete_recipe
from finemoe.cli.output import (
    Json,
    Out,
    Overrides,
    Quiet,
    and_rollouts,
    check_recipe,
    plain_table,
    print_json,
    print_rich,
    report_run,
)


def train(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="A TOML recipe.", show_default=False, autocompletion=complete_recipe),
    ],
    overrides: Overrides = None,
    out: Out = None,
    check: Annotated[
        bool, typer.Option("--check", help="Train nothing: measure a few steps and say what the run takes.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Start; or, where --out holds this run already, go on with it.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the model that a recipe describes.

    A recipe is a TOML file; the smallest names a preset and a number of tokens. The config.json
    of a run is one too, and computes the same again. Ctrl-C, `kill` and a terminal that is closed
    save and stop; `finemoe resume` goes on where it stopped, bit for bit. Under nohup, or when
    nobody reads its output any more, a run goes on in silence. A run is saved four times, and
    every ten minutes. --check trains nothing: it says what a run takes, and ends with status 1
    where one would be refused. Of a recipe with stages it reads the keys of all, and looks at the
    first, and with --out DIR at every other whose beginning is there.

    Several processes train one run together, as [parallel] of the recipe says: with --continue
    torchrun may start them again after one has failed.

    \b
    Examples:
      finemoe train recipes/tiny.toml --check
      finemoe train recipes/tiny.toml
      finemoe train recipes/tiny.toml --out runs/wide \\
        --set model.hidden_size=128 --set training.tokens=200_000
      torchrun --nproc-per-node 2 -m finemoe train recipes/tiny.toml \\
        --out runs/two --continue

    The directory then holds config.json, metrics.jsonl, checkpoints/ and summary.json.
    """
    if "stage" in check_recipe(recipe, overrides or ()):
        _stages(recipe, overrides or (), out, check, quiet, as_json)
        return
    if check:
        _check(recipe, overrides or (), out, quiet, as_json)
        return

    from finemoe.runs import run

    report_run(run.train(recipe, out=out, overrides=overrides or (), quiet=quiet, go_on=go_on), as_json)


def _stages(recipe: Path, overrides: Sequence[str], out: Path | None, check: bool, quiet: bool, as_json: bool) -> None:
    """Run the stages of a recipe, and say what each came to.

    Raises:
        ConfigError: no --out, in which the same command would go on.
        typer.Exit: 130 when a stage was interrupted, after saying how to go on; 1 where --check found something.
    """
    from finemoe.core.errors import ConfigError
    from finemoe.parallel.seat import speaks

    if check:
        from finemoe.cli.staged import check_stages

        check_stages(recipe, overrides, out, quiet, as_json)
        return
    if out is None:
        raise ConfigError(f"{recipe} has stages: say --out DIR, where the same command goes on after an interruption")

    from finemoe.studies.stages import StageInterruptedError, run_stages

    try:
        done = run_stages(recipe, out=out, overrides=overrides, quiet=quiet)
    except StageInterruptedError as error:
        from finemoe.core.logs import console

        again = ["finemoe", "train", str(recipe), "--out", str(out)]
        again += [word for override in overrides for word in ("--set", override)]
        text = f"Interrupted, nothing is lost: {error}: {shlex.join(again)}"
        if speaks():
            console().print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if not speaks():  # one process of them says it
        return
    if as_json:
        print_json({"out": str(out), "stages": done})
        return
    table = plain_table()
    for title in ("Stage", "Came to", "Time"):
        table.add_column(title)
    rows = [_came_to(one) for one in done]
    for row in rows:
        table.add_row(*row)
    print_rich(table)
    if sum(came_to.startswith("loss ") for _, came_to, _ in rows) > 1:
        typer.echo("\nA loss is of what its stage held out: those of stages that read other texts cannot be compared.")
    last = Path(done[-1]["folder"])
    typer.echo(f"\nNext: finemoe show {shlex.quote(str(last))} --out page" + and_rollouts(last))


def _came_to(stage: Mapping[str, Any]) -> list[str]:
    """Name, what was measured, first and last where it was measured before the first step, and time, of a stage."""
    if "sampled" in stage:
        found = stage["sampled"]
        return [stage["stage"], f"{found['kept']:,} of {found['drawn']:,} answers kept", ""]
    summary = stage["summary"]
    measured = {name.removeprefix("final_validation_"): value for name, value in summary.items()
                if name.startswith("final_validation_") and isinstance(value, (int, float))}  # fmt: skip
    before = _before(Path(stage["folder"]))
    if "reward" in measured:
        kept = [name for name in ("reward_answer", "length") if name in measured]
        names = kept if "reward_answer" in kept else ["reward", *kept]
    else:
        names = list(measured)[:3]
    said = (_first_and_last(name, before.get(f"validation_{name}"), measured[name]) for name in names)
    return [stage["stage"], ", ".join(said), f"{summary['seconds']:.0f} s"]


def _before(run: Path) -> Mapping[str, Any]:
    """What was measured before the first step; nothing where a run begins from nothing, or its file cannot be read."""
    from finemoe.core.errors import FinemoeError
    from finemoe.training.directory import read_metrics

    with contextlib.suppress(FinemoeError, OSError):
        return next((one for one in read_metrics(run) if one["kind"] == "validation" and not one["step"]), {})
    return {}


def _first_and_last(name: str, first: Any, last: float) -> str:
    """`right 28 % -> 99 %`, `length 3.4 -> 14`, `loss 1.016`."""

    def shown(value: float) -> str:
        if name == "reward_answer":
            return f"{100 * value:.0f} %"
        return f"{value:.3g}" if name == "length" else f"{value:.3f}"

    title = "right" if name == "reward_answer" else name.replace("_", " ")
    return f"{title} {shown(first)} -> {shown(last)}" if isinstance(first, (int, float)) else f"{title} {shown(last)}"


def _check(recipe: Path, overrides: Sequence[str], out: Path | None, quiet: bool, as_json: bool) -> None:
    """Print what a run would take.

    Raises:
        typer.Exit: 1 when it would be refused.
    """
    from finemoe.runs.planning.check import check

    found = check(recipe, out=out, overrides=overrides, quiet=quiet)
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
    if found.refused:
        raise typer.Exit(1)
