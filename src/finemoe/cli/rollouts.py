"""`finemoe rollouts`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.output import Json, print_json, printable


def rollouts(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of the method grpo.", show_default=False)],
    find: Annotated[str | None, typer.Option("--find", metavar="REGEX", help="Something that the answer says.")] = None,
    which: Annotated[
        str,
        typer.Option("--which", metavar="WHICH", help="all; right or wrong, beside its group; failed to be judged."),
    ] = "all",
    first: Annotated[int, typer.Option("--from", metavar="STEP", help="The first step.", min=1)] = 1,
    last: Annotated[int, typer.Option("--to", metavar="STEP", help="The last step.", min=1)] = 1 << 31,
    longest: Annotated[bool, typer.Option("--longest", help="The longest first.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Show so many at most.", min=1)] = 10,
    as_json: Json = False,
) -> None:
    """Read what a model answered while it learnt to reason.

    A run of the method grpo writes every answer to rollouts.jsonl, with what it was worth and
    why; of every so many rollouts also with ids, log-probabilities and experts.

    \b
    Examples:
      finemoe rollouts runs/r1-zero/3-zero --from 1 --to 20
      finemoe rollouts runs/math --find "[Ww]ait" --which right
      finemoe rollouts runs/math --which failed --json
    """
    from finemoe.core.errors import ConfigError
    from finemoe.methods.grpo.reading import find_answers

    if which not in ("all", "right", "wrong", "failed"):
        raise ConfigError(f"--which {which!r} is none of all, right, wrong, failed")
    found = find_answers(run, find, which=which, steps=(first, last), longest=longest)  # type: ignore[arg-type]
    if as_json:
        print_json(list(islice(found, limit)))
        return
    shown = list(islice(found, limit))
    for one in shown:
        _show(one)
    more = sum(1 for _ in found)
    said = f"{len(shown)} shown" + (f", {more} more: --limit N" if more else "")
    typer.echo(said if shown else "No answer is like that.")


def _show(answer: dict[str, Any]) -> None:
    """A head, the question as it was asked, and the answer."""
    worth = "could not be judged" if answer["value"] is None else f"worth {answer['value']:g}"
    notes = "; ".join(f"{name}: {one['note']}" for name, one in answer["rewards"].items() if one.get("note"))
    typer.secho(
        f"step {answer['step']}, group {answer['group']}: {worth}, {answer['length']} tokens"
        + (f" ({printable(notes)})" if notes else ""),
        bold=True,
    )
    typer.echo(printable(answer.get("asked", answer["prompt"])).rstrip())
    typer.echo(f"{printable(answer['completion'])}\n")
