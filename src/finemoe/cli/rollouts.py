"""`finemoe rollouts`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from finemoe.cli.output import Json, printable

_FEW = 5
"""Steps that are named."""


def rollouts(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run of the method grpo, or stages with one.", show_default=False),
    ],
    find: Annotated[str | None, typer.Option("--find", metavar="REGEX", help="Something that the answer says.")] = None,
    which: Annotated[
        str,
        typer.Option(
            "--which",
            metavar="WHICH",
            help="all; right, wrong or unreadable; better or worse than its group; failed to be judged.",
        ),
    ] = "all",
    first: Annotated[int, typer.Option("--from", metavar="STEP", help="The first step.", min=1)] = 1,
    last: Annotated[
        int | None, typer.Option("--to", metavar="STEP", help="The last step.", min=1, show_default="the last")
    ] = None,
    longest: Annotated[bool, typer.Option("--longest", help="The longest first, of equal ones the newest.")] = False,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Show so many at most.", min=1)] = 10,
    per_group: Annotated[
        int, typer.Option("--per-group", metavar="N", help="Answers to one question at most, of those.", min=1)
    ] = 2,
    as_json: Json = False,
) -> None:
    """Read what a model answered while it learnt to reason.

    A run of the method grpo writes every answer to rollouts.jsonl, with what it was worth and
    why; of every so many rollouts also with ids, log-probabilities and experts. Those that are
    shown are spread over the steps; with --find they are the first ones.

    \b
    Examples:
      finemoe rollouts runs/r1-zero/3-zero --from 1 --to 20
      finemoe rollouts runs/math --find "[Ww]ait" --which right
      finemoe rollouts runs/math --which failed --json | jq .completion
    """
    from finemoe.charts.numbers import clean
    from finemoe.methods.grpo.reading import ROLLOUTS, find_answers, run_of
    from finemoe.training.directory import require_run

    run = run_of(run)
    if not (run / ROLLOUTS).exists():
        require_run(run)  # which knows more of what is there
    found = list(find_answers(run, find, which=which, steps=(first, last), longest=longest))  # type: ignore[arg-type]
    few = list(_of_each_group(found, per_group))
    shown = few[:limit] if longest or find is not None else _spread(few, limit)
    if as_json:
        for one in shown:
            typer.echo(json.dumps(clean(one), ensure_ascii=False, allow_nan=False))
        return
    for one in shown:
        _show(one)
    if shown:
        options = "--per-group N" if len(shown) < limit else "--limit N, --per-group N"
        more = f", {len(found) - len(shown)} more: {options}" if len(found) > len(shown) else ""
        typer.echo(f"{len(shown)} shown{more}")
        return
    kept = "" if any(find_answers(run, steps=(first, last))) else _kept({one["step"] for one in find_answers(run)})
    typer.echo(f"No answer is like that{kept}.")


def _of_each_group(answers: Iterable[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
    """So many at most of each group of a rollout, in their order."""
    seen: Counter[tuple[int, int]] = Counter()
    for one in answers:
        group = one["rollout"], one["group"]
        seen[group] += 1
        if seen[group] <= most:
            yield one


def _spread(answers: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """So many at most, in their order, of steps that lie evenly between the first and the last."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for one in answers:
        by_step.setdefault(one["step"], []).append(one)
    steps = list(by_step)
    if len(steps) > most:
        steps = [steps[number * (len(steps) - 1) // max(1, most - 1)] for number in range(most)]
    in_turn = (one for turn in zip_longest(*(by_step[step] for step in steps)) for one in turn if one is not None)
    return sorted(islice(in_turn, most), key=lambda one: one["step"])


def _kept(steps: Iterable[int]) -> str:
    """Of which steps there are answers: the first few, and the last."""
    words = [f"{step:,}" for step in sorted(steps)]
    listed = ", ".join(words) if len(words) <= _FEW else f"{', '.join(words[: _FEW - 1])} ... {words[-1]}"
    return f": kept are those of steps {listed}" if words else ""


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
    right = " or ".join(printable(str(one)) for one in answer.get("references", ()))
    typer.echo(f"{printable(answer['completion'])}\n" + (f"right: {right}\n" if right else ""))
