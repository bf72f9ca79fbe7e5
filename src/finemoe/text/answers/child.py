"""Answers `answers.judge`: math-verify in a process of its own. A script: requests on stdin, a line of JSON each.

sympy can take for ever, or all memory, on what a language model writes: so the process has limits, and its alarm ends
it when nobody else does. Nothing of finemoe is imported here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any


def judge(gold: str, given: str) -> str:
    """equal, different, or unreadable: math-verify made nothing of one of them."""
    from math_verify import parse, verify

    read = [parse(f"${text}$", parsing_timeout=None, raise_on_error=True) for text in (gold, given)]
    if not all(read):
        return "unreadable"
    return "equal" if verify(*read, timeout_seconds=None, raise_on_error=True) else "different"


def main(memory: int) -> None:
    """Answer until stdin ends. The first line written says that math-verify is loaded."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if sys.platform == "linux":
        most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        judge("1", "1")
        say(ready=True)
    except Exception as error:  # not installed, or not this version
        say(ready=False, note=f"{type(error).__name__}: {error}")
        return
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1.0)  # its default action ends the process
        try:
            verdict = judge(request["gold"], request["given"])
        except (Exception, RecursionError) as error:
            verdict, note = "error", f"{type(error).__name__}: {error}"[:300]
            say(verdict=verdict, note=note)
        else:
            say(verdict=verdict)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
