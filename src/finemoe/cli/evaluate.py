"""`finemoe evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finemoe.cli.analyze.options import MODEL, Encoding, Report, Template, TextField, reading
from finemoe.cli.completion import complete_run, complete_tasks
from finemoe.cli.output import Json, Quiet, WeightsOption, deliver, print_json, print_rich, printable
from finemoe.core.errors import ConfigError

if TYPE_CHECKING:
    from finemoe.evaluation.runner import Settings
    from finemoe.evaluation.task import Task

_SHOWN = 1  # item whose prompt --show prints
_Models = Annotated[
    list[Path] | None,
    typer.Argument(metavar="MODEL...", help=MODEL + " Several are compared.", autocompletion=complete_run),
]
_Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="What to ask; --list names all.", autocompletion=complete_tasks),
]
_Batch = Annotated[
    int,
    typer.Option(
        metavar="N", help="Rows in a pass. In float32 on a CPU it changes no result, elsewhere the last bits."
    ),
]
_Limit = Annotated[
    int | None, typer.Option(metavar="N", help="Only N items of each task: the first, evenly over its subjects.")
]
_Temperature = Annotated[float | None, typer.Option(metavar="T", help="Code: of those samples; 0.8 if unset.")]
_Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[TASK=]PATH",
        help="File or folder of one task, or a folder in which every task finds its own; repeatable. "
        "Default: the hub, through finemoe[hf].",
    ),
]


def evaluate(
    models: _Models = None,
    tasks: _Tasks = None,
    data: _Data = None,
    text_field: TextField = None,
    template: Template = None,
    encoding: Encoding = None,
    limit: _Limit = None,
    shots: Annotated[int | None, typer.Option(metavar="N", help="Worked examples; default: as in the papers.")] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Code: completions of each problem.")] = None,
    temperature: _Temperature = None,
    seed: Annotated[int, typer.Option(help="Of samples and of the bootstrap.")] = 0,
    batch: _Batch = 16,
    weights: WeightsOption = "auto",
    out: Report = None,
    show: Annotated[bool, typer.Option("--show", help="Print the exact prompt of the first item; no model.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name the tasks, with what is scored and by chance.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask models the papers' benchmarks.

    Every score has its error, and says what was left out. Prompts and worked examples are
    pinned: --show prints them to the character. With --out, answers are kept as they come; the
    same command goes on where it was interrupted, and uses none whose model, prompt or data have
    changed. Several models answer the same items, so differences are paired: far smaller ones
    can be told than the single errors suggest.

    \b
    Examples:
      finemoe evaluate --list
      finemoe evaluate --show --tasks mmlu --data sets/
      finemoe evaluate runs/tiny --tasks arc-easy --data sets/ --limit 200
      finemoe evaluate runs/a runs/b --tasks text --data text=held-out.jsonl \\
        --out eval
      finemoe evaluate coder.gguf --tasks humaneval --data sets/ --samples 20

    The folder of --out then holds report.html, results.json, figures/, items/ and answers/.
    """
    if list_:
        _print_list(as_json)
        return
    from finemoe.evaluation.tasks import choose_tasks, read_as

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    given = reading(text_field, template, encoding)
    chosen = read_as(choose_tasks(names, samples, temperature), given)
    sources = _sources(data or [], [task.name for task in chosen])
    if show:
        _print_prompts({task.name: _shown(task, sources[task.name], shots) for task in chosen}, as_json)
        return
    settings = _settings(models, batch, limit, shots, seed)
    from finemoe.evaluation import evaluate as library

    with _told_what_is_kept(out):
        found = library.evaluate(
            models or [], names, sources, settings,
            samples=samples, temperature=temperature, weights=weights, out=out, quiet=quiet, reading=given,
        )  # fmt: skip
    deliver(found, out, as_json, _print_results)


@contextmanager
def _told_what_is_kept(out: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            typer.echo("The answers so far are kept: the same command goes on with them.", err=True)
        raise


def _settings(models: list[Path] | None, batch: int, limit: int | None, shots: int | None, seed: int) -> Settings:
    """How to ask.

    Raises:
        ConfigError: nothing to ask, or a number that cannot work.
    """
    if not models:
        raise ConfigError("no model given: name one, as in `finemoe evaluate runs/tiny --tasks hellaswag --data sets/`")
    if batch < 1:
        raise ConfigError(f"--batch is {batch}: at least 1 row")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}: at least 1 item, or none for all")
    if shots is not None and shots < 0:
        raise ConfigError(f"--shots is {shots}: 0 or more worked examples")

    from finemoe.evaluation.runner import Settings

    return Settings(batch, limit, shots, seed)


def _sources(given: list[str], names: list[str]) -> dict[str, Path | None]:
    """Where each task's data is; None: on the hub.

    Raises:
        ConfigError: data for a task that is not asked, or two places for all.
    """
    named: dict[str, Path] = {}
    common: Path | None = None
    for text in given:
        task, separator, path = text.partition("=")
        if separator and not Path(text).exists():
            if task not in names:
                raise ConfigError(f"--data {text}: {task!r} is not among the tasks asked: {', '.join(names)}")
            if task in named:
                raise ConfigError(f"--data {task}={named[task]} and {text}: only one place for a task")
            named[task] = Path(path)
        elif common is not None:
            raise ConfigError(f"--data {common} and {text}: only one place may be for all tasks; write TASK=PATH")
        else:
            common = Path(text)
    return {name: named.get(name, common) for name in names}


def _print_prompts(shown: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    for text in shown.values():
        typer.echo(printable(text) if sys.stdout.isatty() else text)


def _shown(task: Task, source: Path | None, shots: int | None) -> str:
    from finemoe.evaluation.tasks import describe

    items, _ = task.items(source, shots, _SHOWN)
    return describe(task, items[0])


def _print_list(as_json: bool) -> None:
    from finemoe.evaluation.tasks import TASKS

    rows: list[dict[str, Any]] = [
        {"task": t.name, "title": t.title, "metric": t.metric, "shots": t.shots, "chance": t.chance}
        for t in TASKS.values()
    ]
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Task", "Benchmark", "Metric"):
        table.add_column(heading)
    for heading in ("Shots", "By chance"):
        table.add_column(heading, justify="right")
    for row in rows:
        chance = "–" if row["chance"] is None else f"{100 * row['chance']:.0f} %"
        table.add_row(row["task"], row["title"], row["metric"], str(row["shots"]), chance)
    print_rich(table)


def _print_results(found: Mapping[str, Any]) -> None:
    from rich.text import Text

    from finemoe.evaluation.tables import difference_table, notes, score_table

    print_rich(score_table(found))
    if found["differences"]:
        print_rich(difference_table(found))
    print_rich(*(Text(note) for note in notes(found)))
