"""How long the first steps of a run take, and what they came to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from finemoe.charts.numbers import duration
from finemoe.training.report import StepReport

_WARM_UP = 2  # steps at the beginning that are slower than the rest, and do not count
_SHARES = {"time_rollout": "writing answers", "time_reward": "judging them", "time_update": "all else"}
"""Figures of a step, and what they are called."""


@dataclass
class Pace:
    """Steps as they are measured."""

    advance: Callable[[int], None]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    """Of each step's time, where it writes itself what it learns."""

    def note(self, report: StepReport) -> None:
        """Count a step that was done."""
        self.seconds.append(report.seconds - sum(self.seconds))
        if report.loss is not None:  # a step may hold nothing to count
            self.losses.append(report.loss)
        if "reward" in report.figures:
            self.rewards.append(report.figures["reward"])
        if all(name in report.figures for name in _SHARES):
            self.shares.append({said: report.figures[name] for name, said in _SHARES.items()})
        self.advance(1)

    def is_enough(self, limit: float) -> bool:
        """Whether another step would be too long a wait: after the limit, or, of more than two, beyond it."""
        took = sum(self.seconds)
        return bool(self.seconds) and (took >= limit or (len(self.seconds) > 1 and took + self.seconds[-1] > limit))

    def caveat(self, wanted: int) -> Iterator[str]:
        """What the figures rest on, where fewer steps were measured than wanted."""
        if (done := len(self.seconds)) < wanted:
            steps = "1 step, which" if done == 1 else f"{done} steps, which"
            yield f"the time rests on {steps} took {duration(sum(self.seconds))}; {wanted} would have been a long wait"

    def seconds_a_step(self) -> float:
        """The median without the first steps, where there are enough; else the last."""
        return statistics.median(self.seconds[_WARM_UP:] or self.seconds[-1:])

    def shares_of_a_step(self) -> dict[str, float]:
        """Means over the same steps."""
        found = self.shares[_WARM_UP:] or self.shares[-1:]
        return {said: sum(one[said] for one in found) / len(found) for said in (found[0] if found else ())}


def about_writing(method: Any, own: bool) -> Iterator[str]:
    """What the time of a model that writes itself what it learns depends on beside its size."""
    if not own:
        return
    yield "answers may grow longer while it learns, and steps with them"
    if getattr(method, "server", None) is not None:
        yield "no server was asked: the answers were written here"
