"""Tasks of the package reasoning-gym, each with a rule of its own for what is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.data.problems.problem import Draws, Problem
from finemoe.text.gym import entry

_ENTRIES = 1 << 31


def reasoning_gym(draws: Draws, difficulty: int, dataset: str, options: Mapping[str, Any]) -> Problem:
    """An entry of reasoning-gym's task `dataset`, made with `options`, which say how hard it is.

    Raises:
        ConfigError: the package is not installed, or knows no such task or option.
    """
    number = draws.between(0, _ENTRIES - 1)
    found = entry(dataset, number, options)
    prompt, answer = f"{found['question']}\n", str(found["answer"])
    more = {"reasoning_gym": {"task": dataset, "number": number, "options": dict(options)}}
    return Problem(prompt, answer, answer, (), "reasoning_gym", difficulty, more=more)
