"""Problems made in code, whose answers can be checked: a file a kind, and a line in PROBLEMS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finemoe.core.seeds import derive
from finemoe.data.problems.arithmetic import arithmetic
from finemoe.data.problems.countdown import countdown
from finemoe.data.problems.gym import reasoning_gym
from finemoe.data.problems.problem import Draws, Problem
from finemoe.data.problems.programs import programs
from finemoe.data.problems.running_sum import running_sum
from finemoe.data.problems.sorting import sorting

__all__ = ["DIFFICULTIES", "PROBLEMS", "Draws", "Problem", "problem_at"]

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "running_sum": running_sum,
    "arithmetic": arithmetic,
    "countdown": countdown,
    "sorting": sorting,
    "programs": programs,
    "reasoning_gym": reasoning_gym,
}
"""Kind -> a function of draws, a difficulty and the kind's own options."""
DIFFICULTIES: dict[str, tuple[int, int]] = {
    "running_sum": (6, 100),
    "arithmetic": (2, 20),
    "countdown": (1, 4),
    "sorting": (3, 50),
    "programs": (1, 5),
    "reasoning_gym": (1, 1),
}
"""Kind -> the difficulty where none is asked for, and the highest; the lowest is 1."""


def problem_at(kind: str, seed: int, index: int, difficulty: int, **options: Any) -> Problem:
    """Problem number `index` of a kind, the same on every machine: nothing but the arguments decides.

    Args:
        kind: one of PROBLEMS.
        seed: of the stream.
        index: any whole number; those below zero are what a corpus validates on.
        difficulty: as the kind means it.
        options: of the kind, such as `modulus`.
    """
    return PROBLEMS[kind](Draws(derive(seed, "problems", kind, index, difficulty)), difficulty, **options)
