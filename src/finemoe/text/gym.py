"""Tasks of reasoning-gym: a question by its number, and how right an answer to it is. The `[rl]` extra.

Nothing of an entry has to be kept: its task, number and options make it again. The number is the seed of a dataset of
one entry, as some tasks draw all of theirs when they are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from finemoe.core.config import did_you_mean
from finemoe.core.errors import ConfigError


def require_gym() -> None:
    """Refuse where reasoning-gym is not installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("reasoning_gym") is None:
        raise ConfigError(
            "tasks of reasoning-gym need the package reasoning-gym, which is not installed: pip install 'finemoe[rl]', "
            "or pip install reasoning-gym"
        )


def entry(task: str, number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a task: `question`, `answer` and `metadata`.

    Raises:
        ConfigError: reasoning-gym is not installed, has no such task, or the task does not take these options.
    """
    return dict(_dataset(task, number, json.dumps(options, sort_keys=True))[0])


def credit(task: str, number: int, options: Mapping[str, Any], answer: str) -> float:
    """How right `answer` is to that entry, from 0 to 1, by the task's own rule.

    Raises:
        ConfigError: as of `entry`.
    """
    dataset = _dataset(task, number, json.dumps(options, sort_keys=True))
    return float(dataset.score_answer(answer=answer, entry=dataset[0]))


@lru_cache(maxsize=64)
def _dataset(task: str, number: int, options: str) -> Any:
    require_gym()
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {task!r}{did_you_mean(task, list(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(task, size=1, seed=number, **json.loads(options))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"reasoning-gym's task {task!r} does not take the options {options}: {error}") from error
