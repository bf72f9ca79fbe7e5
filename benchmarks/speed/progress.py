"""What is being measured and how long it will take, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from finemoe.core.logs import console

_PLAIN_INTERVAL = 15.0  # seconds between lines where nobody watches a terminal


class Watch:
    """Parts one after the other, each expected to take some seconds."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self._expected = dict(expected)
        self._done: list[str] = []
        self._spent = 0.0
        self._part = ""
        self._part_started = self._last = time.monotonic()
        screen = console()
        self._bar: Progress | None = None
        if screen.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=screen, transient=True)
            self._task = self._bar.add_task("", total=sum(expected.values()), left="")
            self._bar.start()

    def part(self, name: str) -> None:
        """The next part begins."""
        self._finish()
        self._part, self._part_started = name, time.monotonic()
        self._last = 0.0  # a line at once
        self.tell("")

    def tell(self, text: str) -> None:
        """What is being done within the part."""
        now = time.monotonic()
        line = f"{self._part}: {text}" if text else self._part
        left = f"about {max(1, round(self._left(now) / 60))} min left"
        if self._bar is not None:
            within = min(now - self._part_started, self._expected[self._part])
            done = sum(self._expected[part] for part in self._done) + within
            self._bar.update(self._task, description=line[:56], completed=done, left=left)
        elif now - self._last > _PLAIN_INTERVAL:
            self._last = now
            print(f"{line}, {left}", file=sys.stderr, flush=True)

    def _left(self, now: float) -> float:
        """Seconds, by how the parts that are done compare with what was expected of them."""
        expected_done = sum(self._expected[part] for part in self._done)
        pace = self._spent / expected_done if expected_done else 1.0
        here = max(0.0, pace * self._expected.get(self._part, 0.0) - (now - self._part_started))
        later = [part for part in self._expected if part not in self._done and part != self._part]
        return here + pace * sum(self._expected[part] for part in later)

    def _finish(self) -> None:
        if self._part:
            self._done.append(self._part)
            self._spent += time.monotonic() - self._part_started

    def close(self) -> None:
        """Take the bar away."""
        self._finish()
        if self._bar is not None:
            self._bar.stop()
