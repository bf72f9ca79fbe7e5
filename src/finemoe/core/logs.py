"""What people see (rich, on stderr) and what programs read (JSON Lines).

Results go to stdout, everything else to stderr, so that output can be piped. When nobody reads stderr any more, work
goes on in silence: a run writes metrics.jsonl and its checkpoints as always.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from finemoe.core.reading import decode_json

logger = logging.getLogger("finemoe")
_PLAIN_INTERVAL = 15.0  # seconds between lines when nobody watches a terminal


@contextmanager
def each_once(beginning: str = "") -> Iterator[None]:
    """What is said a second time in there, word for word, is said once, if it begins so."""
    said = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        before, message = len(said), record.getMessage()
        said.add(message)
        return len(said) > before or not message.startswith(beginning)

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


class _Lasting(io.TextIOBase):
    """A stream whose reader may go: from then on it takes words and drops them, and whoever speaks works on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            _drop(self._stream)
        return len(text)


def _drop(stream: TextIO) -> None:
    """Lead what is written to `stream`, whose reader is gone or whose disk is full, nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # or no file of the system
        os.dup2(nowhere.fileno(), stream.fileno())


def console() -> Console:
    """The console for people: stderr, plain when piped, silent when nobody reads it any more."""
    return Console(file=cast(TextIO, _Lasting(sys.stderr)), highlight=False)


def as_text(shown: RenderableType, width: int = 80) -> str:
    """What a table looks like on a plain terminal."""
    screen = Console(file=io.StringIO(), width=width, highlight=False, color_system=None)
    with screen.capture() as capture:
        screen.print(shown)
    return capture.get()


def as_html(shown: RenderableType, width: int = 96) -> str:
    """The same for a notebook: preformatted, so that columns stay columns."""
    return f'<pre style="line-height: 1.25">{escape(as_text(shown, width))}</pre>'


def set_up(*, debug: bool = False) -> None:
    """Send `finemoe` log records to stderr, for the command line."""
    screen = console()
    handler: logging.Handler = _Plain()
    if screen.is_terminal:
        handler = RichHandler(console=screen, show_path=debug, show_time=debug, show_level=False, markup=False)
    handler.setFormatter(_Formatter())
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


def speak() -> None:
    """Let people in Python and notebooks see what the command line shows, unless they configured logging themselves."""
    configured = logger.handlers or logger.level != logging.NOTSET or logger.isEnabledFor(logging.INFO)
    if not configured:
        handler = _Plain()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@contextmanager
def said_above(screen: Console) -> Iterator[None]:
    """For as long as `screen` has a live line: what is logged is written by it too, so that the line makes room."""
    led = [(one, one.console) for one in logger.handlers if isinstance(one, RichHandler)]
    for handler, _ in led:
        handler.console = screen
    try:
        yield
    finally:
        for handler, own in led:
            handler.console = own


class _Plain(logging.Handler):
    """Lines on stderr, wherever that points now; not wrapped, as a pipe has no width."""

    def emit(self, record: logging.LogRecord) -> None:
        _Lasting(sys.stderr).write(self.format(record) + "\n")


class _Formatter(logging.Formatter):
    """The bare message; only what is not routine says its level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


@contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. A bar with ETA on a terminal; on a pipe one line every 15 seconds."""
    screen = console()
    if not screen.is_terminal:
        yield _plain_progress(description, total, unit)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
    )
    with Progress(*columns, TextColumn(unit), TimeRemainingColumn(), console=screen, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def _plain_progress(description: str, total: int | None, unit: str) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < _PLAIN_INTERVAL:
            return
        last = now
        left = f", {(now - started) * (total - done) / done:.0f} s left" if total and done else ""
        logger.info("%s: %s%s %s%s", description, done, f"/{total}" if total else "", unit, left)

    return advance


@contextmanager
def mebibytes(description: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Progress over `total` bytes; yields `advance(bytes)`."""
    if quiet:
        yield lambda _: None
        return
    done = 0
    with progress(description, total >> 20, "MiB") as advance:

        def count(nbytes: int) -> None:
            nonlocal done
            advance((done + nbytes >> 20) - (done >> 20))
            done += nbytes

        yield count


class JsonLines:
    """An append-only JSON Lines file, flushed a record at a time so that a killed process loses at most one line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Remove what a kill left of the last record, so that the next one starts on a line of its own."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_json_lines(
    path: str | os.PathLike[str],
    check: Callable[[dict[str, Any]], object] | None = None,
    on_damage: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Every complete record of a JSON Lines file; a last line cut off by a kill is left out.

    Args:
        path: of the file.
        check: raises ValueError for a record that is none.
        on_damage: is told the number of a damaged line, counted from 1, which is left out then.

    Raises:
        ValueError: a line is damaged, and there is no `on_damage`.
    """
    records = []
    with open(path, "rb") as file:  # bytes: a line may be cut off within a character
        for number, line in enumerate(file, start=1):
            try:
                record = decode_json(line)
                if not isinstance(record, dict):
                    raise ValueError("a line must hold a JSON object")
                if check is not None:
                    check(record)
                records.append(record)
            except ValueError:
                if not line.endswith(b"\n"):
                    continue
                if on_damage is None:
                    raise
                on_damage(number)
    return records
