"""The process that judges: `python -P -m finemoe.judging.child`, a line of JSON in, a line of JSON out.

What it runs may hang, crash, print, or take all memory: it has limits, what is printed goes nowhere, and its parent
(`judging.pool`) ends it with all that it started when it does not answer in time.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

from finemoe.core.errors import ConfigError
from finemoe.judging import KINDS
from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged

_MOST_NOTE = 500  # characters
_GRACE = 1.0  # beyond the deadline, for a parent that is no longer there


def main() -> None:
    """Answer until stdin ends, then take along whatever is still running in this process's group."""
    requests, replies = take_pipes()
    setup = json.loads(requests.readline())
    bounds = Bounds(**setup["bounds"])
    try:
        kinds = {name: KINDS[spec["kind"]] for name, spec in setup["rewards"].items()}
        configs = {name: kind.config.model_validate(setup["rewards"][name]) for name, kind in kinds.items()}
        files = {name: mark for name, one in configs.items() if (mark := one.identity().get("sha256"))}
        judges = {name: kind.make(configs[name], bounds) for name, kind in kinds.items()}
        limit_memory(bounds.memory_bytes)
        if sys.platform == "linux":
            from finemoe.sandbox import kernel

            kernel.adopt_orphans()  # so that all that is started here is found below this process
    except ConfigError as error:
        say(replies, ready=False, note=str(error))
    except BaseException as error:  # a user's file may do anything
        say(replies, ready=False, note=in_words(error))
    else:
        say(replies, ready=True, files=files)
        for line in requests:
            if not _reply(judges, json.loads(line), replies):
                break
    os.killpg(os.getpid(), signal.SIGKILL)


def take_pipes() -> tuple[IO[bytes], IO[str]]:
    """Where the parent asks and is answered; from then on the standard streams lead nowhere."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what somebody prints is no answer, and what somebody reads no request
        os.dup2(nothing, standard)
    return requests, replies


def limit_memory(memory: int) -> None:
    """Allow so much memory beyond what is taken now, and no core dumps.

    The soft limit alone: a program in the sandbox, and math-verify, set their own.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = taken + memory if hard == resource.RLIM_INFINITY else min(taken + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _reply(judges: Mapping[str, Judge], request: Mapping[str, Any], replies: IO[str]) -> bool:
    """Judge once and say so; whether this process is fit for more."""
    own, fit = os.getpid(), True
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE)  # its default action ends the process
    try:
        answer = request["answer"]
        answer["references"] = tuple(answer["references"])
        judged = judges[request["reward"]](Answer(**answer))
    except MemoryError:
        judged, fit = Judged.error("ran out of memory"), False  # what holds it may be held for good
    except KeyError as error:  # as a rule of the record, which others wrote; not where it has that key
        has = ", ".join(answer["record"]) or "nothing"
        where = "" if error.args and error.args[0] in answer["record"] else f"; the record has {has}"
        judged = Judged.error(f"{in_words(error)}{where}"[:_MOST_NOTE])
    except BaseException as error:  # SystemExit, too, says nothing about the answer
        judged = Judged.error(in_words(error))
    if os.getpid() != own:  # a process that was forked in there and came back
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    say(replies, judged=asdict(judged), fit=fit)
    return fit


def in_words(error: BaseException) -> str:
    """The error and the last place that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:300] + where


def say(replies: IO[str], **message: Any) -> None:
    """One line of JSON."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
