"""Alerts: when a router has stopped using its experts, in plain words, with the knob that helps.

How even a load is, is told by its effective number of experts, exp(entropy of the shares): all N when each gets the
same, k (experts per token) when every token chooses the same k. `idle` puts that between 0 and 1.

Thresholds, from 34 runs of the tiny ladder: summed over a twentieth of a run, `idle` of sound runs stays below 0.4 and
ends below 0.1; learning rates four times too large pass 0.5 within the first fifth and come back; a router without
balance loss at a large rate goes to 0.8 and stays above 0.5. Hence an alert needs two windows in a row at 0.5 or more,
after the first tenth of the run, and not falling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig

STARVED = 0.1
"""An expert with less than this share of an even load is starved."""
LEVELS = ((0.5, "uneven"), (0.75, "collapsing"), (0.95, "collapsed"))
"""From which `idle` on, and what it is called."""
RECOVERED = 0.35
"""Below this an alert is over and may be raised again: well under the first level, so that it cannot flicker."""
RECOVERED_WORD = "recovered"
DEAD_SHARE = 0.1
"""This share of a layer's experts without any token in two windows is `uneven`, however the others fare."""
ENOUGH = 50
"""Assignments that an even load must give each expert before its absence means anything."""
FALLING = 0.05
"""A window this much better than the one before is on its way back, and not worth an alert."""
SEE = "docs/howto/keep-experts-balanced.md"


@dataclass(frozen=True)
class Imbalance:
    """How one layer's load is spread."""

    experts: int
    starved: int
    """Experts with less than a tenth of an even share, the dead included."""
    dead: int
    """Experts with nothing."""
    hottest: float
    """The largest load over the mean."""
    effective: float
    """exp(entropy) of the shares."""
    idle: float
    """(experts - effective) / (experts - experts per token): 0 even, 1 when every token chooses the same experts."""

    @property
    def level(self) -> int:
        """How bad: 0 is fine, else a place in `LEVELS`, from 1."""
        return max(self.idle_level, self.dead_level)

    @property
    def idle_level(self) -> int:
        """The same by `idle` alone."""
        return sum(self.idle >= threshold for threshold, _ in LEVELS)

    @property
    def dead_level(self) -> int:
        """The same by experts that get nothing."""
        return int(self.dead >= max(1.0, DEAD_SHARE * self.experts))

    def words(self) -> str:
        """One clause for people."""
        if self.starved:
            dead = f" ({self.dead} of them nothing)" if self.dead else ""
            get = "gets" if self.starved == 1 else "get"
            counted = f"{self.starved} of {self.experts} experts {get} less than a tenth of the even share{dead}"
        else:
            counted = f"the load of its {self.experts} experts is uneven"
        return f"{counted}, one {self.hottest:.2g} times the share, as if there were {self.effective:.0f} experts"


def imbalance(load: ArrayLike, experts_per_token: int) -> Imbalance | None:
    """`load [experts]`: assignments. None where it says nothing: too few of them, or every expert always chosen."""
    counts = np.asarray(load, dtype=np.float64)
    experts, mean = len(counts), counts.mean() if len(counts) else 0.0
    if experts_per_token >= experts or mean < ENOUGH:
        return None
    effective = effective_experts(counts)
    return Imbalance(
        experts=experts,
        starved=int((counts < STARVED * mean).sum()),
        dead=int((counts == 0).sum()),
        hottest=float(counts.max() / mean),
        effective=effective,
        idle=(experts - effective) / (experts - experts_per_token),
    )


def effective_experts(load: ArrayLike) -> float:
    """exp of the entropy of `load [experts]`: how many evenly used experts would be as even; 0 for no load."""
    counts = np.asarray(load, dtype=np.float64)
    if not counts.any():
        return 0.0
    share = counts[counts > 0] / counts.sum()
    return math.exp(-float((share * np.log(share)).sum()))


@dataclass(frozen=True)
class Knobs:
    """What a run could turn, with its present values."""

    learning_rate: float
    balancing_rate: float | None = None
    """Of the selection bias, per step."""
    opened: bool = False
    """The run begins with a trained model: [balance] of its recipe sets the losses, which model.* would not."""
    routers_move: bool = True
    """False where [trainable] leaves them as they are."""


def advice(layer: MoEConfig, knobs: Knobs | None) -> tuple[str, str]:
    """The knob's name and the sentence about it; `knobs` is None for a model whose training is not known."""
    table = layer.balance
    if not layer.router.learned:
        knob = "model.feed_forward.router.table"
        return knob, f'A hash router learns nothing: {knob} = "balanced" deals tokens out by how frequent they are'
    if knobs is not None and not knobs.routers_move:
        knob = "optimizer.learning_rate"
        return knob, (
            "[trainable] leaves its router as it is, so that no balance loss and no bias changes this; where it was "
            f"even at the start, lower {knob} (now {knobs.learning_rate:g})"
        )
    losses = "balance" if knobs is not None and knobs.opened else "model.feed_forward.balance"
    if layer.router.selects_with_bias:
        knob = "balancing.rate"
        now = f" (now {knobs.balancing_rate:g})" if knobs is not None and knobs.balancing_rate is not None else ""
        said = f"Raise {knob}{now} or {losses}.sequence (now {table.sequence:g})"
    else:
        knob = f"{losses}.expert"
        start = "Raise" if table.expert else "Set"
        usual = "" if table.expert else ", 0.01 is usual"
        said = f"{start} {knob} (now {table.expert:g}{usual})"
    if knobs is not None:
        said += f" or lower optimizer.learning_rate (now {knobs.learning_rate:g})"
    return knob, said


@dataclass(frozen=True)
class Alert:
    """Something to say about one layer, once."""

    step: int
    layer: int
    level: str
    """A word of `LEVELS`, or `recovered`."""
    message: str
    knob: str
    found: Imbalance

    def to_record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {
            "kind": "alert",
            "step": self.step,
            "layer": self.layer,
            "level": self.level,
            "message": self.message,
            "knob": self.knob,
            "see": SEE,
            "starved": self.found.starved,
            "dead": self.found.dead,
            "experts": self.found.experts,
            "hottest": round(self.found.hottest, 4),
            "effective_experts": round(self.found.effective, 2),
            "idle": round(self.found.idle, 4),
        }


def alert_for(step: int, number: int, layer: MoEConfig, found: Imbalance, level: int, knobs: Knobs | None) -> Alert:
    """The alert of `level` (from 1) for layer `number`."""
    knob, said = advice(layer, knobs)
    name = LEVELS[level - 1][1]
    message = f"layer {number}, {name}: {found.words()}. {said}; see {SEE}"
    return Alert(step, number, name, message, knob, found)


def routed_layers(model: ModelConfig) -> dict[int, MoEConfig]:
    """The MoE layers by index, those of multi-token prediction after the others."""
    blocks = enumerate((*model.blocks, *model.mtp))
    return {number: b.feed_forward for number, b in blocks if isinstance(b.feed_forward, MoEConfig)}


class Watch:
    """Sums loads over windows of steps and says what is new. Its state follows from the loads alone."""

    def __init__(self, layers: Mapping[int, MoEConfig], total_steps: int, knobs: Knobs | None = None) -> None:
        # What learns nothing cannot collapse, and no knob would help.
        self._layers = {number: layer for number, layer in layers.items() if layer.router.learned}
        self._knobs = knobs
        self.window = max(10, min(200, total_steps // 20))
        """Steps whose loads are summed: one batch alone is mostly noise."""
        self.settled = min(1000, total_steps // 10)
        """Steps in which routers may sort themselves out."""
        self._sums: dict[int, NDArray[np.int64]] = {}
        self._before: dict[int, NDArray[np.int64]] = {}
        self._said: dict[int, int] = {}

    def after(self, step: int, load: Mapping[int, ArrayLike]) -> list[Alert]:
        """What is to be said after `step` (from 1), given its `load` by layer; mostly nothing."""
        if step <= self.settled:
            return []
        for number in self._layers.keys() & load.keys():
            counts = np.asarray(load[number], dtype=np.int64)
            self._sums[number] = self._sums[number] + counts if number in self._sums else counts
        if (step - self.settled) % self.window:
            return []
        now, before = self._sums, self._before
        self._sums, self._before = {}, now
        found = [self._judge(step, number, before[number], now[number]) for number in sorted(now.keys() & before)]
        return [alert for alert in found if alert is not None]

    def replay(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Come to the state after the records of a run that goes on, without saying anything again.

        What was said is what its alerts say: a run that became longer, or lost a line, has other windows now. A step
        without a record, or one that was passed over, ends a window all the same.
        """
        loads = {one["step"]: one["load"] for one in records if one["kind"] == "step" and "load" in one}
        done = max((one["step"] for one in records if one["kind"] in ("step", "skipped")), default=0)
        for step in range(1, done + 1):
            load = {int(number): one for number, one in loads.get(step, {}).items()}
            self.after(step, {number: one for number, one in load.items() if self._fits(number, one)})
        words = {RECOVERED_WORD: 0} | {word: level for level, (_, word) in enumerate(LEVELS, start=1)}
        said = [(one["layer"], words.get(one["level"], 0)) for one in records if one["kind"] == "alert"]
        self._said = {number: level for number, level in said if number in self._layers}

    def _fits(self, number: int, load: Sequence[int]) -> bool:
        """A file may be damaged: a load of another layer would be added up with this one's."""
        return number in self._layers and len(load) == self._layers[number].num_routed_experts

    def _judge(self, step: int, number: int, before: NDArray[np.int64], now: NDArray[np.int64]) -> Alert | None:
        layer = self._layers[number]
        k = layer.experts_per_token
        first, second, both = imbalance(before, k), imbalance(now, k), imbalance(before + now, k)
        if first is None or second is None or both is None:
            return None
        said = self._said.get(number, 0)
        level = min(max(first.idle_level, both.dead_level), max(second.idle_level, both.dead_level))
        if said and second.idle < RECOVERED and not both.level:
            self._said[number] = 0
            words = f"layer {number} has recovered: it is as if {second.effective:.0f} of its {second.experts}"
            return Alert(
                step, number, RECOVERED_WORD, f"{words} experts were in even use", advice(layer, self._knobs)[0], second
            )
        if level <= said or second.idle < first.idle - FALLING:
            return None
        self._said[number] = level
        return alert_for(step, number, layer, both, level, self._knobs)
