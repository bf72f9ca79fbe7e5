"""`finemoe evaluate`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finemoe.cli.analyze.options import MODEL, Report
from finemoe.cli.output import Json, Quiet, check_report, print_json, print_rich, printable, say_where
from finemoe.core.errors import ConfigError

if TYPE_CHECKING:
    from finemoe.evaluation.results import Evaluated
    from finemoe.evaluation.runner import Settings
    from finemoe.evaluation.task import Item, Task

    Loaded = dict[str, tuple[Sequence[Item], int]]

_SHOWN = 1  # item whose prompt --show prints
_Models = Annotated[list[Path] | None, typer.Argument(metavar="MODEL...", help=MODEL + " Several are compared.")]
_Dtype = Literal["fp32", "bf16", "stored"]
_DtypeOption = Annotated[_Dtype, typer.Option(help="Weights in memory.")]
_Batch = Annotated[
    int,
    typer.Option(
        metavar="N", help="Rows in a pass. In float32 on a CPU it changes no result, elsewhere the last bits."
    ),
]
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
    tasks: Annotated[str | None, typer.Option(metavar="NAME,...", help="What to ask; --list names all.")] = None,
    data: _Data = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only N items of each task: the first, evenly over its subjects.")
    ] = None,
    shots: Annotated[int | None, typer.Option(metavar="N", help="Worked examples; default: as in the papers.")] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Code: completions of each problem.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Code: of those samples; 0.8 if unset.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples and of the bootstrap.")] = 0,
    batch: _Batch = 16,
    dtype: _DtypeOption = "fp32",
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
      finemoe evaluate runs/tiny --tasks hellaswag,lambada --data sets/ --limit 200
      finemoe evaluate runs/a runs/b --tasks text --data text=held-out.jsonl --out eval
      finemoe evaluate coder.gguf --tasks humaneval --data sets/ --samples 20

    The folder of --out then holds report.html, results.json, figures/, items/ and answers/.
    """
    if list_:
        _print_list(as_json)
        return
    chosen = _tasks(tasks, samples, temperature)
    sources = _sources(data or [], [task.name for task in chosen])
    if show:
        _print_prompts({task.name: _shown(task, sources[task.name], shots) for task in chosen}, as_json)
        return
    check_report(out, "evaluation", ours=("answers",))
    _check(models, batch, limit, shots)

    from finemoe.evaluation.runner import Settings

    settings = Settings(batch, limit, shots, seed)
    sampling = {"samples": samples, "temperature": temperature} if samples is not None else {}
    with _told_what_is_kept(out):
        found = _run(models or [], chosen, sources, settings, sampling, dtype, out, quiet)
    if as_json:
        print_json(found)
    else:
        _print_results(found, out)


@contextmanager
def _told_what_is_kept(out: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            typer.echo("The answers so far are kept: the same command goes on with them.", err=True)
        raise


def _check(models: list[Path] | None, batch: int, limit: int | None, shots: int | None) -> None:
    if not models:
        raise ConfigError("no model given: name one, as in `finemoe evaluate runs/tiny --tasks hellaswag --data sets/`")
    if batch < 1:
        raise ConfigError(f"--batch is {batch}: at least 1 row")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}: at least 1 item, or none for all")
    if shots is not None and shots < 0:
        raise ConfigError(f"--shots is {shots}: 0 or more worked examples")


def _tasks(names: str | None, samples: int | None, temperature: float | None) -> list[Task]:
    """The tasks of `--tasks`, with `--samples` where it is given.

    Raises:
        ConfigError: none, an unknown one, or sampling that has no effect.
    """
    from finemoe.evaluation.tasks import find_task, sampled

    wanted = list(dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip()))
    if not wanted:
        raise ConfigError("no task given: add --tasks hellaswag,lambada or others; --list names all")
    if temperature is not None and samples is None:
        raise ConfigError(f"--temperature {temperature:g} does nothing without --samples N, for code")
    found = [find_task(name) for name in wanted]
    if samples is None:
        return found
    heat = temperature if temperature is not None else 0.8 if samples > 1 else 0.0
    return [sampled(task, samples, heat) for task in found]


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


def _run(
    models: list[Path],
    tasks: list[Task],
    sources: dict[str, Path | None],
    settings: Settings,
    sampling: dict[str, Any],
    dtype: _Dtype,
    out: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """Ask every model everything; the results, written to `out` where there is one."""
    from contextlib import nullcontext

    from finemoe.checkpoint.kinds import kind_of
    from finemoe.core.files import sole_writer
    from finemoe.evaluation.output import write
    from finemoe.evaluation.results import results

    for model in models:
        kind_of(model)  # a path that holds nothing is refused before the first model is read
    names = _names(models)
    # A set that is missing, or a system that runs no code, is told before a model has worked for hours.
    loaded = {task.name: task.items(sources[task.name], settings.shots, settings.limit) for task in tasks}
    sandbox = _layers(tasks, loaded)
    with nullcontext() if out is None else sole_writer(out):
        done = []
        for name, path in zip(names, models, strict=True):
            done.append(_ask_one(name, path, tasks, loaded, settings, dtype, out, quiet))
            command = shlex.join(["finemoe", *sys.argv[1:]])
            found = results(done, settings, command=command, sandbox=sandbox, sampling=sampling)
            if out is not None:  # after each model: an interruption loses nothing that was told
                write(out, found, done)
    return found


def _ask_one(
    name: str,
    path: Path,
    tasks: list[Task],
    loaded: Loaded,
    settings: Settings,
    dtype: _Dtype,
    out: Path | None,
    quiet: bool,
) -> Evaluated:
    from finemoe.checkpoint.language_model import open_language_model
    from finemoe.evaluation.results import Evaluated
    from finemoe.evaluation.runner import Answers, ask, describe_model, fingerprint, require_middle

    opened = open_language_model(path, dtype)
    for task in tasks:
        require_middle(opened, task.name, loaded[task.name][0])
    key = fingerprint(opened)
    asked = {}
    for task in tasks:
        answers = Answers(None if out is None else out / "answers" / f"{task.name}.jsonl")
        try:
            asked[task.name] = ask(
                opened, task, None, settings, answers, model_key=key, quiet=quiet, loaded=loaded[task.name]
            )
        finally:
            answers.close()
    return Evaluated(name, describe_model(opened, key), asked)


def _names(models: list[Path]) -> list[str]:
    """What to call each model: the last part of its path, or as much as tells it from the others."""
    parts = [path.resolve().parts for path in models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    repeated = next(str(path) for path in models if models.count(path) > 1)
    raise ConfigError(f"{repeated} is named twice: name each model once")


def _layers(tasks: list[Task], loaded: Loaded) -> dict[str, str] | None:
    """The layers of the sandbox and which are active, where a task runs code.

    Raises:
        ConfigError: code would be run, and cannot be run here.
    """
    from finemoe.evaluation.tasks import runs_code
    from finemoe.sandbox.sandbox import layers, supported

    running = [task.name for task in tasks if runs_code(task, loaded[task.name][0])]
    if not running:
        return None
    if (why := supported()) is not None:
        raise ConfigError(f"{', '.join(running)}: {why}")
    return dict(layers())


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


def _print_results(found: dict[str, Any], out: Path | None) -> None:
    from rich.text import Text

    from finemoe.evaluation.tables import difference_table, notes, score_table

    print_rich(score_table(found))
    if found["differences"]:
        print_rich(difference_table(found))
    print_rich(*(Text(note) for note in notes(found)))
    if out is not None:
        say_where(out)
