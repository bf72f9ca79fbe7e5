"""The other end of `process.Peer`: a process that does what one line of JSON asks for, and answers with one.

Needs nothing but Python, so that any interpreter can run it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Operations = Mapping[str, Callable[..., dict[str, Any]]]


def answering() -> Callable[[Mapping[str, Any]], None]:
    """What writes an answer to stdout. What libraries print there goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return answer


def serve(operations: Operations, **ready: Any) -> None:
    """Announce `ready`, then answer until stdin ends. What libraries print to stdout goes to stderr."""
    answer = answering()
    answer({**ready, **memory()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(operations[request.pop("do")](**request))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


def memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most.

    Linux keeps in `ru_maxrss` what the parent had when it started this process, so /proc is asked where there is one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"resident": peak, "peak": peak}
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"resident": found["VmRSS"], "peak": found["VmHWM"]}
