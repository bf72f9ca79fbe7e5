"""A child process that answers a line with a line, as its parent sees it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_LOOKS = 0.2  # [s] between looks whether somebody is still to wait


def ask(
    child: subprocess.Popen[bytes], request: str, seconds: float, look: Callable[[], object] = lambda: None
) -> dict[str, Any] | None:
    """What it answers to a line; None where it has died, answers no JSON, or not in time: then it has to be ended.

    `look` is called a few times a second while it is waited for; what it raises ends the wait.
    """
    assert child.stdin is not None
    until, left, pipe = time.monotonic() + seconds, request.encode() + b"\n", child.stdin.fileno()
    os.set_blocking(pipe, False)  # a long line waits for one who reads it, who may hang
    while left:
        if not _ready(pipe, select.POLLOUT, until, look):
            return None
        try:
            left = left[os.write(pipe, left) :]
        except OSError:
            return None
    return next_line(child, until - time.monotonic(), look)


def next_line(
    child: subprocess.Popen[bytes], seconds: float, look: Callable[[], object] = lambda: None
) -> dict[str, Any] | None:
    """The child's next line, or None where it gives none in time."""
    assert child.stdout is not None
    until, pieces = time.monotonic() + seconds, [b""]
    while not pieces[-1].endswith(b"\n"):
        if not _ready(child.stdout.fileno(), select.POLLIN, until, look):
            return None
        data = os.read(child.stdout.fileno(), 1 << 16)
        if not data:
            return None
        pieces.append(data)
    try:
        return dict(json.loads(b"".join(pieces)))
    except ValueError:
        return None


def _ready(pipe: int, event: int, until: float, look: Callable[[], object]) -> bool:
    """Whether a pipe can be written to, or read from, before `until`."""
    waiting = select.poll()  # select.select knows no file beyond the 1,024th, which a server soon has open
    waiting.register(pipe, event)
    while not waiting.poll(1000 * min(_LOOKS, max(0.0, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
        look()
    return True


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it started, though it may have ended itself; it must lead a session of its own."""
    if child.returncode is None:  # nobody has waited for it yet, so that its number is still its own, and its group's
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it never read
                pipe.close()


def has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it runs no more, or has closed its pipe, and so will never answer.

    Nobody waits for it, so that its number stays its own, and its group's, until it is ended here. `os.waitid` can look
    without waiting, too, but macOS has it from Python 3.13 on only.
    """
    if child.returncode is not None:
        return True
    assert child.stdout is not None
    pipe = select.poll()
    pipe.register(child.stdout, select.POLLIN)
    return any(event & select.POLLHUP for _, event in pipe.poll(0))


def end_all(child: subprocess.Popen[bytes]) -> None:
    """Kill it and all that it started, those that lead a session of their own, too."""
    if child.returncode is None:
        for pid in below(child.pid):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    end(child)


def below(pid: int) -> list[int]:
    """The processes that a process has started and those that they have, as far as Linux tells; else none."""
    found: list[int] = []
    left = [pid]
    while left:
        parent = left.pop()
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    left += (children := [int(child) for child in file.read().split()])
                    found += children
    return found
