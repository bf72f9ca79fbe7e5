"""The benchmarks of the papers, as a table by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from finemoe.core.errors import ConfigError
from finemoe.evaluation.task import Generate, Item, LogLikelihood, Request, Task
from finemoe.evaluation.tasks.chinese import CHINESE
from finemoe.evaluation.tasks.closed_book import CLOSED_BOOK
from finemoe.evaluation.tasks.english import ENGLISH
from finemoe.evaluation.tasks.exams import EXAMS
from finemoe.evaluation.tasks.language import LANGUAGE, TextTask
from finemoe.evaluation.tasks.mathematics import MATHEMATICS
from finemoe.evaluation.tasks.programs import PROGRAMS, ProgramTask, pass_at_k

__all__ = ["TASKS", "choose_tasks", "describe", "find_task", "pass_at_k", "read_as", "runs_code", "sampled"]

_ALL: Sequence[Task] = (*LANGUAGE, *ENGLISH, *EXAMS, *CHINESE, *CLOSED_BOOK, *MATHEMATICS, *PROGRAMS)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; it suggests the nearest.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the tasks are {', '.join(TASKS)}"
    raise ConfigError(f"no task is named {name!r}: {hint}")


def choose_tasks(names: Sequence[str], samples: int | None = None, temperature: float | None = None) -> list[Task]:
    """The tasks of these names, each once; with `samples`, several completions for each problem.

    Raises:
        ConfigError: none, an unknown one, or sampling that has no effect.
    """
    if not names:
        raise ConfigError("no task given: add --tasks hellaswag,lambada or others; --list names all")
    if temperature is not None and samples is None:
        raise ConfigError(f"--temperature {temperature:g} does nothing without --samples N, for code")
    found = [find_task(name) for name in dict.fromkeys(names)]
    if samples is None:
        return found
    heat = temperature if temperature is not None else 0.8 if samples > 1 else 0.0
    return [sampled(task, samples, heat) for task in found]


def sampled(task: Task, samples: int, temperature: float) -> Task:
    """The task with several completions for each problem, for pass@k.

    Raises:
        ConfigError: fewer than one sample, several that would all be the same, or a task that runs no code.
    """
    if samples < 1 or temperature < 0 or (samples > 1 and temperature == 0):
        raise ConfigError(
            f"{task.name}: samples is {samples} and temperature {temperature}: one sample, or several at a "
            f"temperature above 0, as greedy completions are all the same"
        )
    if not isinstance(task, ProgramTask):
        known = ", ".join(program.name for program in PROGRAMS)
        raise ConfigError(f"{task.name}: samples is {samples}, but pass@k is of code that is run: {known}")
    return replace(task, samples=samples, temperature=temperature)


def read_as(tasks: Sequence[Task], reading: Mapping[str, str]) -> list[Task]:
    """The tasks, where the one that reads files of any text reads them so: `text_field`, `template`, `encoding`.

    Raises:
        ConfigError: no such task is among them.
    """
    if reading and not any(isinstance(task, TextTask) for task in tasks):
        raise ConfigError(f"{', '.join(reading)} is of the task `text`, which is not among {[t.name for t in tasks]}")
    chosen = tuple(reading.items())
    return [replace(task, reading=chosen) if isinstance(task, TextTask) else task for task in tasks]


def runs_code(task: Task, items: Sequence[Item]) -> bool:
    """Whether judging these items runs what the model writes."""
    return isinstance(task, ProgramTask) and any("tests" in item.facts for item in items)


def describe(task: Task, item: Item) -> str:
    """What is sent to the model for this item, to the character; what several requests share is shown once."""
    shots = item.facts.get("shots", 0)
    head = f"{task.name} {item.id}: requests {len(item.requests)}, worked examples {shots}"
    lines = [head + (f", group {item.group}" if item.group else "")]
    shown: dict[str, int] = {}
    for number, request in enumerate(item.requests, start=1):
        for title, text in _parts(request):
            lines.append(f"--- {number} of {len(item.requests)}: {title}")
            if text in shown:
                lines[-1] += f" as in {shown[text]}"
            elif text:
                shown[text] = number
                lines.append(text)
    return "\n".join(lines) + "\n--- end"


def _parts(request: Request) -> list[tuple[str, str]]:
    """Titles and texts of a request."""
    if isinstance(request, LogLikelihood):
        return [
            ("context" if request.context else "no context", request.context),
            (f"scored: {request.continuation!r}", ""),
        ]
    if isinstance(request, Generate):
        how = f"at most {request.max_new_tokens} tokens, stops {list(request.stops)!r}, samples {request.samples}"
        parts = [(f"prompt ({how}, temperature {request.temperature:g})", request.prompt)]
        return parts + ([("text after the gap", request.suffix)] if request.suffix else [])
    return [("the whole text is scored", request.text)]
