"""A reward for programs: those that pass their record's tests, in the sandbox."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finemoe.core.errors import ConfigError
from finemoe.judging.verdicts import Answer, Bounds, Judge, Judged, Weighted
from finemoe.sandbox.sandbox import Limits, execute, supported

_BLOCK = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LEAST = 64 << 20  # what the sandbox wants


class ProgramReward(Weighted):
    """Right where a program passes all tests of its record, run apart from everything else.

    The program is the last code block of an answer, or the whole answer; the tests are `tests` of the record, one text
    or a list of them, or `test_list`; of a `test` with `entry_point`, as HumanEval has them, the call is added.
    """

    kind: Literal["tests"] = "tests"


def tests(config: ProgramReward, bounds: Bounds) -> Judge:
    """Unreadable: neither a code block nor Python. Error: no tests, or the sandbox failed.

    Raises:
        ConfigError: no program can be run on this system.
    """
    problem = supported()
    if problem is not None:
        raise ConfigError(f"rewards of kind `tests` run programs, and {problem}")
    seconds = bounds.deadline_seconds
    limits = Limits(seconds, seconds, max(_LEAST, bounds.memory_bytes))

    def judge(answer: Answer) -> Judged:
        wanted = _tests(answer.record)
        if wanted is None:
            return Judged.error("its record has no `tests`")
        blocks = _BLOCK.findall(answer.text)
        program = blocks[-1] if blocks else answer.text
        if not program.strip() or (not blocks and not _is_python(program)):
            return Judged.unreadable("no program in it")
        run = execute(f"{program}\n\n{wanted}\n", limits)
        if run.verdict == "error":
            return Judged.error(f"the sandbox: {run.note}")
        return Judged.whether(run.verdict == "passed", "" if run.verdict == "passed" else f"{run.verdict}: {run.note}")

    return judge


def _tests(record: Mapping[str, Any]) -> str | None:
    for name in ("tests", "test_list"):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, Sequence) and value and all(isinstance(one, str) for one in value):
            setup = record.get("test_setup_code") or ""
            return "\n".join([str(setup), *value])
    if isinstance(record.get("test"), str) and isinstance(record.get("entry_point"), str):
        return f"{record['test']}\ncheck({record['entry_point']})"
    return None


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
