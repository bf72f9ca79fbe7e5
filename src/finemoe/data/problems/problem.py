"""A problem that can be checked, and the numbers that one is drawn with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Problem:
    """What is asked, what is right, and how one gets there."""

    prompt: str
    answer: str
    """The answer alone."""
    solution: str
    """The steps written out; it ends with the answer."""
    steps: tuple[str, ...]
    """What each step of the solution must say, in order."""
    kind: str
    difficulty: int
    tests: tuple[str, ...] | None = None
    """Of a program: statements that raise an error where it is wrong."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of its record, which a checker of its own reads."""


class Draws:
    """A stream of random numbers that is the same on every machine and in every Python.

    Only `random.random` is asked, whose numbers Python promises to keep; `choice`, `sample` and `shuffle` may change.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._next = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._next() * (high - low + 1))

    def one(self, items: Sequence[ItemT]) -> ItemT:
        """One of `items`."""
        return items[self.between(0, len(items) - 1)]

    def some(self, items: Sequence[ItemT], number: int) -> list[ItemT]:
        """So many of `items`, each once, in any order."""
        left = list(items)
        for place in range(number):
            other = self.between(place, len(left) - 1)
            left[place], left[other] = left[other], left[place]
        return left[:number]
