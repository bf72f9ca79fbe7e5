"""What several verbs print, and the options they share."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

WeightsOption = Annotated[
    Literal["auto", "fp32", "bf16", "stored", "int8", "int4"],
    typer.Option(
        "--weights",
        help="In memory: int8 and int4 make large products small; auto keeps small ones and has all else in fp32; "
        "bf16 takes half of fp32, and loses nothing that is stored so; stored: as they are in the file.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, such as model.hidden_size=128; repeatable.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: a new folder in runs/.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def check_recipe(recipe: Path, overrides: Sequence[str]) -> Mapping[str, Any]:
    """Read a recipe before the imports that take a second; a pipe, which can be read only once, is left alone.

    Returns:
        its tables, without the overrides; none of a pipe.

    Raises:
        ConfigError: no such recipe, no TOML, or an override that is none.
    """
    from finemoe.core.config import read_tables, with_overrides

    tables = read_tables(recipe) if recipe.is_file() or not recipe.exists() else {}
    with_overrides(tables, overrides)
    return tables


def deliver(
    results: Mapping[str, Any], out: Path | None, as_json: bool, show: Callable[[Mapping[str, Any]], None]
) -> None:
    """Print results as JSON and nothing else; or with `show`, and then where the report and its data are."""
    if as_json:
        print_json(results)
        return
    show(results)
    if out is not None:
        typer.echo(f"\nOpen  {out / 'report.html'} in a browser; it works offline\nData  {out / 'results.json'}")


def print_json(value: Any) -> None:
    """`value` on stdout; what is not finite becomes null, for which JSON has a name."""
    from finemoe.charts.numbers import clean

    sys.stdout.write(json.dumps(clean(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_rich(*renderables: Any) -> None:
    """Tables and text for people, on stdout."""
    from rich.console import Console

    screen = Console(highlight=False)
    for renderable in renderables:
        screen.print(renderable)


def plain_table(
    padding: tuple[int, int] | tuple[int, int, int, int] = (0, 1, 0, 0), *, show_edge: bool = False, **title: Any
) -> Any:
    """A table with no line but the one under its head."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=show_edge, **title)


def number_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Any:
    """`plain_table` of untrusted text; all but the first column are numbers."""
    from rich.text import Text

    made = plain_table((0, 1))
    for number, column in enumerate(columns):
        made.add_column(Text(column), justify="right" if number else "left")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def report_run(run: Any, as_json: bool) -> None:
    """Print the summary of a `finemoe.runs.run.Run`.

    Raises:
        typer.Exit: 130 when it was interrupted, after saying how to go on.
    """
    from finemoe.charts.numbers import count, duration, fixed
    from finemoe.core.logs import console
    from finemoe.parallel.seat import resuming, speaks
    from finemoe.runs.planning.machine import other_work

    if not speaks():  # one process of the run says it
        raise typer.Exit(130 if run.interrupted else 0)
    if as_json:
        print_json({"directory": str(run.directory), "interrupted": run.interrupted, **run.summary})
    if run.interrupted:
        text = f"Interrupted, nothing is lost. Go on with: {resuming(run.directory)}"
        console().print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    if as_json:
        return
    summary = run.summary
    passed, shares = summary.get("skipped_steps"), summary.get("capacity_shares")
    total, active = count(summary["total_parameters"]), count(summary["active_parameters"])
    lines = [
        *((title_of(key), _measured(key, summary)) for key in measured_keys(summary) if not _is_bound(key, summary)),
        *([("Training loss", fixed(loss, 4))] if (loss := training_loss(summary)) is not None else []),
        ("Parameters", f"{total}, {active} active"),
        ("Trained on", f"{count(summary['tokens'])} tokens in {summary['steps']:,} steps"),
        *([("Passed over", f"{passed} steps that held nothing to count")] if passed else []),
        *([("Capacity", f"of the micro-batches of each of {shares} processes")] if shares else []),
        ("Time", f"{duration(summary['seconds'])}, {count(summary['tokens_per_second'])} tokens/s"),
        *([("", work)] if (work := other_work()) else []),
    ]
    width = max(16, *(len(label) for label, _ in lines)) + 2
    print_rich(*(f"{label:<{width}}{text}" for label, text in lines))
    typer.echo(f"{'Directory':<{width}}{run.directory}")
    typer.echo(f"\nNext: {_next_step(run.directory)}{and_rollouts(run.directory)}")


def _next_step(run: Path) -> str:
    """What to do with a finished run."""
    directory = shlex.quote(str(run))
    if _method_of(run) == "reward":
        return f"in Python, finemoe.rewards({str(run)!r}, conversations)"
    if (run / CHAT_TEMPLATE).exists():
        return f"finemoe chat {directory}"
    return f'finemoe generate {directory} --prompt "..."'


def and_rollouts(run: Path) -> str:
    """One more line of what to do next, where a run has written what it learnt from; else nothing."""
    return f"\n      finemoe rollouts {shlex.quote(str(run))}" if (run / "rollouts.jsonl").exists() else ""


def _method_of(run: Path) -> Any:
    """The kind of method in the configuration of a run; None where that cannot be read, as only a hint hangs on it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads((run / "config.json").read_bytes())["method"]["kind"]
    return None


CHAT_TEMPLATE = "chat_template.jinja"
"""As in `finemoe.text.chat`, without the time that its imports take; a test compares them."""


def _measured(key: str, summary: Mapping[str, Any]) -> str:
    per_token = key in IN_NATS and "final_validation_accuracy" not in summary  # a preference is of pairs
    interval = ""
    if (low := summary.get(f"{key}_low")) is not None and (high := summary.get(f"{key}_high")) is not None:
        interval = f" ({low:.4f} to {high:.4f})"
    if summary[key] is None:
        return "-"
    return f"[bold]{summary[key]:.4f}[/bold]{interval}{' nats per token' if per_token else ''}"


def _is_bound(key: str, summary: Mapping[str, Any]) -> bool:
    """Whether it is an end of the interval of another figure, which is printed behind that."""
    return any(key.endswith(end) and key.removesuffix(end) in summary for end in ("_low", "_high"))


IN_NATS = ("final_validation_loss",)
"""Figures of a summary that have a unit."""


def measured_keys(summary: Mapping[str, Any]) -> list[str]:
    """The figures of the last measurement in a summary: those of pre-training, or whatever a method measures."""
    return [key for key in summary if key.startswith("final_") and key != "final_training_loss"]


def training_loss(summary: Mapping[str, Any]) -> float | None:
    """Of a summary; None of a run that is rewarded: a policy gradient's loss says nothing of how good it is."""
    loss: float | None = summary["final_training_loss"]
    return None if "final_validation_reward" in summary else loss


def title_of(key: str) -> str:
    """`final_validation_loss` as a person would write it."""
    words = key.removeprefix("final_").replace("_", " ")
    return words[:1].upper() + words[1:]


def printable(text: str) -> str:
    """`text` for a terminal, without control characters, which a model may write by chance."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)


def bytes_of(given: str | None, option: str) -> int | None:
    """`2GB`, `512MiB` or a number of bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from finemoe.core.errors import ConfigError

    if given is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError as error:
        raise ConfigError(f"{option}: {given!r} is no size; write it as 2GB, 512MiB or a number of bytes") from error
