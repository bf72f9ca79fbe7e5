"""math-verify, kept in a child process that answers many questions and is replaced when it does not answer in time."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from finemoe.core.child import ask, end, next_line

Equality = Literal["equal", "different", "unreadable", "error"]
"""error: the comparison itself failed or took too long, which says nothing about the answer."""

_VERDICTS: dict[str, Equality] = {"equal": "equal", "different": "different", "unreadable": "unreadable"}
_CHILD = Path(__file__).with_name("child.py")
_MEMORY = 2 << 30
_START_SECONDS = 60.0  # importing sympy on a busy machine
_STARTS_IN_VAIN = 3


class Judge:
    """One child, started at the first question. Threads take turns."""

    def __init__(self, memory: int = _MEMORY) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._vain = 0

    def compare(self, gold: str, given: str, deadline_seconds: float) -> Equality:
        """What math-verify says of two expressions in LaTeX; `error` where it fails or takes longer."""
        with self._lock:
            child = self._process if self._process is not None and self._process.poll() is None else self._start()
            if child is None:
                return "error"
            answer = None
            try:
                request = json.dumps({"gold": gold, "given": given, "seconds": deadline_seconds})
                answer = ask(child, request, deadline_seconds)
            finally:  # an interrupt, too, leaves a child whose next answer belongs to this question
                if answer is None:
                    self._end()
            return _VERDICTS.get(answer.get("verdict", ""), "error") if answer is not None else "error"

    def close(self) -> None:
        """End the child; the next question starts another."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes] | None:
        self._end()
        if self._vain >= _STARTS_IN_VAIN:
            return None
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD), str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        ready = next_line(self._process, _START_SECONDS)
        if ready is None or not ready.get("ready"):
            self._vain += 1
            self._end()
        return self._process

    def _end(self) -> None:
        child, self._process = self._process, None
        if child is not None:
            end(child)


def available() -> bool:
    """Whether math-verify is installed."""
    return find_spec("math_verify") is not None


@cache
def shared_judge() -> Judge:
    """The judge of this process, which ends with it."""
    judge = Judge()
    atexit.register(judge.close)
    return judge
