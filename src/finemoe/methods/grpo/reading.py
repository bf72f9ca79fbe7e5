"""What a run of GRPO wrote, found again: the answer where a model first checked itself, or the one that cheated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finemoe.core.errors import ConfigError, RunError
from finemoe.core.logs import read_json_lines
from finemoe.core.reading import damage_of

ROLLOUTS = "rollouts.jsonl"
Which = Literal["all", "right", "wrong", "failed"]


def find_answers(
    run: str | os.PathLike[str],
    find: str | None = None,
    *,
    which: Which = "all",
    steps: tuple[int, int] | None = None,
    longest: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers of a run, in the order in which they were written; those of some rollouts with ids and routes too.

    Args:
        run: a directory of the method `grpo`.
        find: a regular expression that is somewhere in the answer.
        which: all; those worth more than the others of their group; those worth less; those whose reward failed.
        steps: the first and the last.
        longest: the longest first.

    Raises:
        RunError: the run wrote none, or they cannot be read.
        ConfigError: `find` is no regular expression.
    """
    path = Path(run) / ROLLOUTS
    if not path.exists():
        raise RunError(f"{path} is not there: a run of the method grpo writes it, from its first step on")
    try:
        wanted = re.compile(find) if find is not None else None
    except re.error as error:
        raise ConfigError(f"{find!r} is no regular expression: {error}") from error
    with damage_of(path, "remove the line"):
        read = read_json_lines(path, on_damage=lambda _: None)
        answers = [_complete(one) for one in read if one.get("kind") == "answer"]
    found = [
        one
        for one in answers
        if (wanted is None or wanted.search(one["completion"]))
        and (steps is None or steps[0] <= one["step"] <= steps[1])
        and _is(one, which)
    ]
    yield from sorted(found, key=lambda one: -one["length"]) if longest else found


def _complete(answer: dict[str, Any]) -> dict[str, Any]:
    """With its length and its advantage, which were written of the tokens alone at first."""
    if "length" not in answer:
        advantages = answer["advantages"]
        answer["length"] = len(answer["completion_ids"])
        answer["advantage"] = sum(advantages) / len(advantages) if advantages else 0.0
    return answer


def _is(answer: dict[str, Any], which: Which) -> bool:
    advantage = answer["advantage"]
    match which:
        case "all":
            return True
        case "right":
            return answer["value"] is not None and advantage > 0
        case "wrong":
            return answer["value"] is not None and advantage < 0
        case "failed":
            return answer["value"] is None
