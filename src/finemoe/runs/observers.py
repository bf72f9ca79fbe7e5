"""Observers: what happens around steps. In list order: validate, log, warn, show; then `saving.Save`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from finemoe.core.errors import OutageError, RunError
from finemoe.core.files import storage_error, sync
from finemoe.core.logs import JsonLines, console, logger, said_above
from finemoe.parallel.world import ROWS_FIGURE
from finemoe.runs.trackers import Tracker
from finemoe.training.alerts import RECOVERED_WORD, Watch
from finemoe.training.method import Measured, Note, Shown
from finemoe.training.report import StepReport
from finemoe.training.trainer import Plan, Trainer

Record = dict[str, Any]


@dataclass
class Evaluate:
    """Measure every `every` steps and after the last one."""

    every: int
    emit: Callable[[Record], None]
    latest: Measured | None = None
    step: int = 0
    """After which that was found."""
    missed: bool = False
    """The run was asked to end while it waited for a measurement."""

    def is_due(self, trainer: Trainer) -> bool:
        """Whether what the trainer has come to is to be measured."""
        return trainer.done or trainer.state.step % self.every == 0

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Measure when it is time."""
        if self.is_due(trainer):
            self.measure(trainer)

    def measure(self, trainer: Trainer) -> None:
        """Measure now; what is waited for no longer, since the run was asked to end, is left to who goes on with it.

        Raises:
            OutageError: something elsewhere did not answer, and nobody asked the run to end.
        """
        state = trainer.state
        try:
            self.latest, self.step = trainer.measure(), state.step
        except OutageError as error:
            if not trainer.stopping:
                raise
            self.missed = True  # and no more than that: the step is done, and has yet to be logged and saved
            logger.warning("%s: step %d is measured when the run goes on", error, state.step)
            return
        head = {"kind": "validation", "step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 4)}
        self.emit({**head, **self.latest.to_record()})

    def close(self) -> None:
        """Nothing to release."""


class Log:
    """metrics.jsonl, always; and the trackers that were asked for. A context manager around the run."""

    def __init__(self, path: Path, trackers: Sequence[Tracker]) -> None:
        self._path = path
        with self._storage():
            self._file = JsonLines(path)
        self._trackers = trackers

    def emit(self, record: Record) -> None:
        """Write one record everywhere."""
        with self._storage():
            self._file.write(record)
        for tracker in self._trackers:
            tracker.write(record)

    def keep(self, record: Record) -> None:
        """Write one record to the file alone: it may be of an earlier step, and trackers take steps in order only."""
        with self._storage():
            self._file.write(record)

    def sync(self) -> None:
        """Make what was written survive a power cut; from any thread."""
        with self._storage():
            sync(self._path)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Write the step."""
        self.emit(report.to_record())

    def close(self) -> None:
        """Nothing yet: the last checkpoint has its record to write."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file and the trackers."""
        for tracker in self._trackers:
            tracker.close()
        with self._storage():
            self._file.close()

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self._path, error) from error


NOTE_WORD = "note"
"""The level of a record of kind warning that warns of nothing."""
_SHOWN_ALERTS = 3  # of one step: a deep model may collapse in every layer at once


_MOST_ROWS = 2.0
"""Of the process that received most over the mean, from where on all others wait more than they compute."""
_LONG = 10  # steps in a row


@dataclass
class Warn:
    """Say when a router stops using its experts, in the log for people and as a record of its own."""

    watch: Watch
    emit: Callable[[Record], None]
    _uneven: int = 0
    """Steps in a row in which one process received far more rows than the others."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Look at the loads of the step."""
        alerts = self.watch.after(report.step, {number: load.cpu().numpy() for number, load in report.load.items()})
        for alert in alerts:
            self.emit(alert.to_record())
        for alert in alerts[:_SHOWN_ALERTS]:
            say = logger.info if alert.level == RECOVERED_WORD else logger.warning
            say("step %d: %s", report.step, alert.message)
        if more := alerts[_SHOWN_ALERTS:]:
            logger.warning("and %d more layers: see the records of kind alert in metrics.jsonl", len(more))
        for said in trainer.method.warns(report):
            note = {"level": NOTE_WORD} if isinstance(said, Note) else {}
            self.emit({"kind": "warning", "step": report.step, **note, "message": said})
            (logger.info if note else logger.warning)("step %d: %s", report.step, said)
        rows = report.figures.get(ROWS_FIGURE, 0.0)
        self._uneven = self._uneven + 1 if rows > _MOST_ROWS else 0
        if self._uneven == _LONG:
            logger.warning(
                "step %d: for %d steps the experts of one process have received more than %g times the mean of rows "
                "(%.1f now), and the other processes wait for it: balance the router, or lower parallel.expert",
                report.step,
                _LONG,
                _MOST_ROWS,
                rows,
            )

    def close(self) -> None:
        """Nothing to release."""


class Write:
    """The files that a method writes itself, line by line. A context manager around the run."""

    def __init__(self, directory: Path, writes: Mapping[str, Callable[[], Sequence[Mapping[str, Any]]]]) -> None:
        self._writes = writes
        self._directory = directory
        self._files: dict[str, JsonLines] = {}

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Write what came up in the step.

        Raises:
            RunError: the disk is full or unwritable.
        """
        self._write()

    def _write(self) -> None:
        for name, take in self._writes.items():
            path = self._directory / name
            try:
                file = self._files.get(name) or self._files.setdefault(name, JsonLines(path))
                for record in take():
                    file.write(record)
            except OSError as error:
                raise storage_error(path, error) from error

    def close(self) -> None:
        """Nothing yet: a step may still come."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the files; of a step that something elsewhere ended, first write what may show the reason."""
        if isinstance(error, OutageError):
            with suppress(RunError):
                self._write()
        for file in self._files.values():
            file.close()


_BAR = 10
_CLOCK = 12
"""Columns of the stroke between step and steps, of the time that is left, and of the blanks in between."""
_LONG_CLOCK = 12  # the same without a bar, of a run that may take days


class Show:
    """A live line on a terminal, two for a method with figures of its own; on a pipe plain lines.

    Those come every ten seconds, or, of a method that has figures of its own, after every step. When such a method has
    measured what was held out, one of the answers is shown.
    """

    def __init__(self, evaluate: Evaluate, total_steps: int) -> None:
        self._evaluate, self._total = evaluate, total_steps
        self._last = time.monotonic()
        self._told: Measured | None = None
        self._screen = console()
        self._live: _Live | None = None

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Refresh."""
        validation, shows = self._evaluate.latest, trainer.method.shows
        total = _steps_in_all(trainer.plan, report)
        if self._screen.is_terminal and self._live is None:
            self._live = _Live(self._screen, self._total, several=bool(shows))
        if shows and validation is not None and validation is not self._told:
            self._told = validation
            for line in _sample(validation, self._evaluate.step, self._screen.width - 2):
                logger.info("%s", line)
        if self._live is not None:
            self._live.show(report.step, total, _short(report, validation, shows))
        elif shows or time.monotonic() - self._last > 10 or trainer.done:
            self._last = time.monotonic()
            left = report.seconds / report.step * (total - report.step)
            logger.info("step %d/%d  %s  %.0f s left", report.step, total, _long(report, validation, shows), left)

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self._live is not None:
            self._live.close()


class _Live:
    """Lines at the foot of a terminal: where the run stands comes first, what does not fit is a figure."""

    def __init__(self, screen: Console, total_steps: int, *, several: bool) -> None:
        """`several`: a second line; the bar gives way to figures then."""
        columns = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
        bar = () if several else (BarColumn(bar_width=_BAR),)
        steps = 2 * len(str(total_steps))
        first = screen.width - steps - (_LONG_CLOCK if several else _BAR + _CLOCK)
        self._rooms = [first, screen.width] if several else [first]
        self._progress, self._second = Progress(*bar, *columns, console=screen), ""
        self._task = self._progress.add_task("", total=total_steps)
        self._lines = Live(get_renderable=self._drawn, console=screen)
        self._held = ExitStack()
        self._held.enter_context(said_above(screen))
        self._held.enter_context(self._lines)

    def show(self, step: int, total: int, figures: Sequence[str]) -> None:
        """Put figures there, those that matter most at first."""
        first, *others = flow(figures, self._rooms)
        self._second = others[0] if others else ""
        self._progress.update(self._task, completed=step, total=total, description=first)

    def close(self) -> None:
        """Leave them on the screen."""
        self._held.close()

    def _drawn(self) -> RenderableType:
        return Group(self._progress, Text(self._second, no_wrap=True)) if self._second else self._progress


def _steps_in_all(plan: Plan, report: StepReport) -> int:
    """Of the run; where a bound of tokens will end it first, as many as it allows if steps stay as long as so far."""
    if plan.max_tokens is None or not report.tokens:
        return plan.total_steps
    left = max(0, plan.max_tokens - report.tokens)
    return min(plan.total_steps, report.step + math.ceil(left * report.step / report.tokens))


def _short(report: StepReport, validation: Measured | None, shows: Sequence[Shown]) -> list[str]:
    """Figures for the live line, those that matter most at first."""
    shown = f"val {_headline(validation, 3)}"
    if shows:  # what was measured stands above already
        return [*shown_figures(report, shows), shown]
    speed = f"{report.tokens_per_second / 1000:.1f}k/s"
    return [f"loss {_loss(report, 3)}", shown, f"grad {report.gradient_norm:.2f}", *_vio(report), speed]


def flow(figures: Sequence[str], rooms: Sequence[int]) -> list[str]:
    """Lines of at most `rooms` [characters], with as many of `figures` as fit, in their order, each of them whole."""
    lines, place = [""] * len(rooms), 0
    for one in figures:
        while place < len(rooms) and len(_joined(lines[place], one)) > rooms[place]:
            place += 1
        if place == len(rooms):
            break
        lines[place] = _joined(lines[place], one)
    return lines


def _joined(line: str, one: str) -> str:
    return f"{line} {one}" if line else one


def _sample(validation: Measured, step: int, width: int) -> list[str]:
    """What was measured after `step`, and one of the answers, always to the same question: lines of `width` columns."""
    said = [f"step {step}: validation {_headline(validation, 3)}"]
    for one in validation.to_record().get("samples", ())[:1]:
        worth = "" if one.get("value") is None else f" worth {one['value']:g}"
        said[0] += f"; asked {_quoted(one.get('asked', one['prompt']))}"
        said.append(f"  answer{worth}: {_quoted(one['answer'])}")
    lines = [Text(line) for line in said]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return [line.plain for line in lines]


def _quoted(text: str) -> str:
    """On one line, and without control characters, which a model may write by chance."""
    return json.dumps("".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text),
                      ensure_ascii=False)  # fmt: skip


def _long(report: StepReport, validation: Measured | None, shows: Sequence[Shown]) -> str:
    shown = _headline(validation, 4)
    first = "  ".join(shown_figures(report, shows)) if shows else f"loss {_loss(report, 4)}"
    vio = "".join(f" {one}" for one in _vio(report))
    return (
        f"{first}  validation {shown}  gradient {report.gradient_norm:.2f}  "
        f"{report.tokens_per_second:,.0f} tokens/s{vio}"
    )


def _headline(validation: Measured | None, digits: int) -> str:
    found = None if validation is None else validation.headline
    return "-" if found is None else f"{found:.{digits}f}"


def _loss(report: StepReport, digits: int) -> str:
    return "-" if report.loss is None else f"{report.loss:.{digits}f}"


def shown_figures(report: StepReport, shows: Sequence[Shown]) -> list[str]:
    """Those that there are."""
    known = {**report.terms, **report.figures}
    return [
        f"{one.title} {'/'.join(_number(known[name], one) for name in one.names)}{' %' * one.percent}"
        for one in shows
        if all(name in known for name in one.names)
    ]


def _number(value: float, shown: Shown) -> str:
    """Three digits; of a share two, and whole percents of several that belong together."""
    if not shown.percent:
        return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    share = 100 * value
    if len(shown.names) > 1 or share >= 9.95 or not share:
        return f"{share:.0f}"
    return "<0.1" if share < 0.05 else f"{share:.1f}"


def _vio(report: StepReport) -> list[str]:
    violations = report.max_vio().values()
    rows = [f"rows {report.figures[ROWS_FIGURE]:.2f}"] if ROWS_FIGURE in report.figures else []
    return [f"MaxVio {sum(violations) / len(violations):.2f}", *rows] if violations else rows
