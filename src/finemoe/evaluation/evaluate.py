"""Evaluate models: from names of tasks and paths of models to the results, and to the folder that holds them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finemoe.charts.numbers import clean
from finemoe.charts.report import require_report_folder, write_report
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.language_model import Weights, open_language_model
from finemoe.core.environment import command_line
from finemoe.core.errors import ConfigError
from finemoe.core.files import sole_writer
from finemoe.evaluation.results import Evaluated, results
from finemoe.evaluation.runner import Answers, Asked, Settings, ask, describe_model, fingerprint, require_middle
from finemoe.evaluation.task import Item, Task
from finemoe.evaluation.tasks import choose_tasks, read_as, runs_code
from finemoe.sandbox import sandbox

Source = str | os.PathLike[str]
Loaded = Mapping[str, tuple[Sequence[Item], int]]
"""By task: its items, and how many records could not be read."""


def evaluate(
    models: Sequence[Source] | Source,
    tasks: Sequence[str] | str,
    data: Mapping[str, Source | None] | Source | None = None,
    settings: Settings | None = None,
    *,
    samples: int | None = None,
    temperature: float | None = None,
    weights: Weights = "auto",
    out: Source | None = None,
    quiet: bool = False,
    reading: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Ask every model every task.

    Args:
        models: run directories, imported or Hugging Face folders, GGUF files, or one of them. Several are compared,
            item by item.
        tasks: names of TASKS; one text is read as after `--tasks`, with commas between names.
        data: a file or folder for all tasks, or one by task; where there is none, the hub.
        settings: how they are asked; as in the papers when None.
        samples: completions of each problem, of tasks that run code.
        temperature: of those samples; 0.8 for several when None.
        weights: what they are in memory.
        out: folder for the report, with items/MODEL/TASK.jsonl. answers/ in it keeps every answer as it comes: the same
            call goes on with them where it was interrupted.
        quiet: no progress on stderr.
        reading: `text_field`, `template` or `encoding` of the files that the task `text` reads.

    Returns:
        What results.json holds.

    Raises:
        FinemoeError: nothing to open, no data, a task that cannot be asked, or a folder that holds something else.
    """
    folder = require_report_folder(out, "evaluation", ours=("answers",))
    settings = settings or Settings()
    models = [models] if isinstance(models, (str, os.PathLike)) else models
    tasks = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
    chosen = read_as(choose_tasks(tasks, samples, temperature), reading)
    for model in models:
        kind_of(Path(model))  # a path that holds nothing is refused before the first model is read
    names = _names([Path(model) for model in models])
    # A set that is missing, or a system that runs no code, is told before a model has worked for hours.
    sources = data if isinstance(data, Mapping) else dict.fromkeys(tasks, data)
    loaded = {task.name: task.items(_path(sources.get(task.name)), settings.shots, settings.limit) for task in chosen}
    confined = _layers(chosen, loaded)
    sampling = {"samples": samples, "temperature": temperature} if samples is not None else {}
    with nullcontext() if folder is None else sole_writer(folder):
        done: list[Evaluated] = []
        found: dict[str, Any] = {}
        for name, path in zip(names, models, strict=True):
            done.append(_ask_one(name, Path(path), chosen, loaded, settings, weights, folder, quiet))
            found = results(done, settings, command=command_line(), sandbox=confined, sampling=sampling)
            if folder is not None:  # after each model: an interruption loses nothing that was told
                from finemoe.charts.evaluation.figures import figures
                from finemoe.charts.evaluation.page import evaluation_page

                write_report(folder, found, evaluation_page, figures, beside=dict(_items(done)))
    return found


def _path(source: Source | None) -> Path | None:
    return None if source is None else Path(source)


def _ask_one(
    name: str,
    path: Path,
    tasks: Sequence[Task],
    loaded: Loaded,
    settings: Settings,
    weights: Weights,
    out: Path | None,
    quiet: bool,
) -> Evaluated:
    opened = open_language_model(path, weights)
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


def _names(models: Sequence[Path]) -> list[str]:
    """What to call each model: the last part of its path, or as much as tells it from the others."""
    if not models:
        raise ConfigError("no model to evaluate: name at least one")
    parts = [path.resolve().parts for path in models]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    repeated = next(str(path) for path in models if models.count(path) > 1)
    raise ConfigError(f"{repeated} is named twice: name each model once")


def _layers(tasks: Sequence[Task], loaded: Loaded) -> dict[str, str] | None:
    """The layers of the sandbox and which are active, where a task runs code.

    Raises:
        ConfigError: code would be run, and cannot be run here.
    """
    running = [task.name for task in tasks if runs_code(task, loaded[task.name][0])]
    if not running:
        return None
    if (why := sandbox.supported()) is not None:
        raise ConfigError(f"{', '.join(running)}: {why}")
    return dict(sandbox.layers())


def _items(models: Sequence[Evaluated]) -> Iterator[tuple[str, str]]:
    """What became of every item, as JSON Lines by file."""
    for model in models:
        folder = re.sub(r"[^\w.-]+", "-", model.name).strip(".-") or "model"
        for name, asked in model.asked.items():
            yield f"items/{folder}/{name}.jsonl", "".join(_lines(asked))


def _lines(asked: Asked) -> Iterator[str]:
    for item, judged in zip(asked.items, asked.judged, strict=True):
        record: dict[str, Any] = {"id": item.id, "group": item.group, "outcome": judged.outcome}
        record |= {"scores": dict(judged.scores), "weight": judged.weight, "note": judged.note}
        yield json.dumps(clean(record), ensure_ascii=False, allow_nan=False) + "\n"
