"""What stops a run without losing it: the signals by which a person, a terminal or a machine asks it to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterable
from types import FrameType
from typing import Any, Self, final

INSISTENT = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
"""Ctrl-C, `kill` and Ctrl-\\: who sends a second one wants the process to end at once."""
REPEATED = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or connection that is gone, and the warnings of batch systems and of `ulimit -t`. What sends one sends
more of them: a closed terminal two, a limit of processor time one a second."""
POLITE = INSISTENT + REPEATED
"""All by which a person, a terminal or a machine asks a run to end."""


def repeated(processes: int) -> tuple[signal.Signals, ...]:
    """What may be sent more than once without being meant so, to a run of so many processes.

    A batch system tells every process of a job, and torchrun, told as well, tells its own once more. It kills those
    that take too long, so no process has to end at the second by itself.
    """
    return REPEATED if processes == 1 else (*REPEATED, signal.SIGTERM)


@final
class StopOnSignal:
    """Turn the first of `signals` into a request; then give the old handlers back, so that a second one is Python's.

    All but `repeated`, which stay harmless until the end of the block: the second must not end the process while it
    saves. Where one of them was ignored before, as under nohup, it stays ignored. Only the main thread may set
    handlers; in any other this does nothing.
    """

    def __init__(
        self,
        request: Callable[[], object],
        signals: Iterable[signal.Signals] = POLITE,
        *,
        repeated: Collection[signal.Signals] = REPEATED,
    ) -> None:
        self._request = request
        self._repeated = repeated
        self._signals = tuple(signals)
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in self._signals:
            if number in INSISTENT or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore(number for number in self._signals if number not in self._repeated)
        self._request()

    def _restore(self, numbers: Iterable[signal.Signals]) -> None:
        for number in numbers:
            if number in self._old:
                signal.signal(number, self._old.pop(number))

    def __exit__(self, *exception: object) -> None:
        self._restore(self._signals)
