"""Advantages: how much better an answer, or a step of it, is than others of its group (DeepSeekMath 4.1.2, 4.1.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Scale = Literal["std", "none", "raw"]
"""std: over the group's deviation; none: the difference from the group's mean as it is; raw: no difference at all, the
value itself (Online RFT, DeepSeekMath 5.2.1)."""
_ALIKE = 1e-6
"""Differences below it, of the mean or of 1, are rounding; over their own deviation they would look like merit."""
Step = tuple[int, float]
"""Tokens of the answer up to the end of a step, and what the step is worth."""


def outcome(values: Sequence[float | None], scale: Scale) -> list[float]:
    """Of each answer of a group: its value less the mean, over the standard deviation of the group.

    None is an answer that could not be judged: it counts in neither, and gets 0. Where all are worth the same, but for
    rounding, every advantage is exactly 0; not so with "raw", by which an answer is not compared.
    """
    known = [one for one in values if one is not None]
    mean, spread = _moments(known, scale)
    return [0.0 if one is None or not spread else (one - mean) / spread for one in values]


def process(steps: Sequence[Sequence[Step] | None], lengths: Sequence[int], scale: Scale) -> list[list[float]]:
    """Of each token of each answer: the normalised worth of the steps that end at it or behind it, added up.

    The worth of all steps of the group is normalised together.

    Args:
        steps: of each answer, in order; None where it could not be judged, and then all of its advantages are 0.
        lengths: tokens of each answer.
        scale: as in `outcome`.
    """
    mean, spread = _moments([worth for one in steps if one is not None for _, worth in one], scale)
    found = []
    for one, length in zip(steps, lengths, strict=True):
        tokens = [0.0] * length
        if one and spread:
            for end, worth in one:
                tokens[min(end, length) - 1] += (worth - mean) / spread
            for place in range(length - 2, -1, -1):
                tokens[place] += tokens[place + 1]
        found.append(tokens)
    return found


def _moments(values: Sequence[float], scale: Scale) -> tuple[float, float]:
    """The mean, and what differences from it are divided by; 0 where there are no differences."""
    if not values:
        return 0.0, 0.0
    if scale == "raw":
        return 0.0, 1.0
    mean = math.fsum(values) / len(values)
    furthest = max(values) - min(values)
    if furthest <= _ALIKE * max(1.0, abs(mean)):
        return 0.0, 0.0
    if scale == "none":
        return mean, 1.0
    return mean, furthest * math.sqrt(math.fsum(((one - mean) / furthest) ** 2 for one in values) / len(values))
