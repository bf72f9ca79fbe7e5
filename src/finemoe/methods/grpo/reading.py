"""What a run of GRPO wrote, found again: the answer where a model first checked itself, or the one that cheated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from finemoe.checkpoint.kinds import stages_below
from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import read_json_lines
from finemoe.core.reading import damage_of, read_object
from finemoe.methods.grpo.config import COMPARING

ROLLOUTS = "rollouts.jsonl"
Which = Literal["all", "right", "wrong", "unreadable", "better", "worse", "failed"]


def find_answers(
    run: str | os.PathLike[str],
    find: str | None = None,
    *,
    which: Which = "all",
    steps: tuple[int, int | None] | None = None,
    longest: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers of a run, in the order in which they were written; those of some rollouts with ids and routes too.

    Args:
        run: a directory of the method `grpo`, or a folder of stages of which one is.
        find: a regular expression that is somewhere in the answer.
        which: all; right, wrong or unreadable, as the first reward says that compares with what is right, or else the
            first; better or worse than the others of their group; failed, which could not be judged.
        steps: the first and the last; None: the run's last.
        longest: the longest first, of equal ones the newest.

    Raises:
        RunError: the run wrote none, or they cannot be read.
        ConfigError: `find` is no regular expression, or `which` is none of those.
    """
    if which not in get_args(Which):
        raise ConfigError(f"which {which!r} is none of {', '.join(get_args(Which))}")
    run = run_of(run)
    path = run / ROLLOUTS
    if not path.exists():
        raise RunError(f"{path} is not there: a run of the method grpo writes it, from its first step on")
    try:
        wanted = re.compile(find) if find is not None else None
    except re.error as error:
        raise ConfigError(f"{find!r} is no regular expression: {error}") from error
    with damage_of(path, "remove the line"):
        read = read_json_lines(path, on_damage=lambda _: None)
        answers = [_complete(one) for one in read if one.get("kind") == "answer"]
    judge = _judge_of(run)
    first, last = steps or (1, None)
    found = [
        one
        for one in answers
        if (wanted is None or wanted.search(one["completion"]))
        and first <= one["step"]
        and (last is None or one["step"] <= last)
        and _is(one, which, judge)
    ]
    yield from sorted(found, key=lambda one: (-one["length"], -one["step"])) if longest else found


def run_of(folder: str | os.PathLike[str]) -> Path:
    """The run in `folder` whose answers are meant: itself, or of a folder of stages the only one that wrote any.

    Raises:
        RunError: several did.
    """
    folder = Path(folder)
    if (folder / ROLLOUTS).exists():
        return folder
    below = [one for one in stages_below(folder) if (one / ROLLOUTS).exists()]
    if len(below) > 1:
        raise RunError(f"{folder}: several runs in it have answers; name one of them: {', '.join(map(str, below))}")
    return below[0] if below else folder


def _judge_of(run: Path) -> str | None:
    """The name of the first reward that says what is right; None where nobody knows, or there is none."""
    path = run / "config.json"
    with suppress(RunError, LookupError, TypeError):
        for one in read_object(path, "put it back")["method"]["rewards"]:
            if one["kind"] in COMPARING:
                return str(one.get("name") or one["kind"])
    return None


def _complete(answer: dict[str, Any]) -> dict[str, Any]:
    """With its length and its advantage, which were written of the tokens alone at first."""
    if "length" not in answer:
        advantages = answer["advantages"]
        answer["length"] = len(answer["completion_ids"])
        answer["advantage"] = sum(advantages) / len(advantages) if advantages else 0.0
    return answer


def _is(answer: dict[str, Any], which: Which, judge: str | None) -> bool:
    rewards = answer["rewards"]
    said: dict[str, Any] = next(iter(rewards.values()), {}) if judge is None else rewards.get(judge) or {}
    judged = answer["value"] is not None
    match which:
        case "all":
            return True
        case "better":
            return judged and answer["advantage"] > 0
        case "worse":
            return judged and answer["advantage"] < 0
        case "failed":
            return not judged or said.get("verdict") == "error"
    return bool(said.get("verdict") == which)
