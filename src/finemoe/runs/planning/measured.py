"""This machine as a device of the planner: what its products and its memory reach, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finemoe.core import memory
from finemoe.parallel.planner.devices import Device, this_machine
from finemoe.parallel.planner.step_time import Constants

_SIDE = 1024  # of a product large enough to reach what products reach here
_COPIED = 1 << 26  # numbers of float32: far beyond any cache
_TURNS = 5


@dataclass(frozen=True)
class Here:
    """What benchmarks/planner.py and train_memory.py found on this kind of machine, judged on other runs."""

    constants: Constants
    beside: int
    """[bytes] Of a process that trains: interpreter, libraries, threads."""

    def options(self, device: str) -> dict[str, Any]:
        """Of `plan`, where `device` is this machine."""
        return {"constants": self.constants, "beside": self.beside} if device == "here" else {}


HERE = Here(
    Constants(
        bf16=1.0886, fp8=1.0, experts=0.7597, scores=0.3685, passes=14.68, operands=1.0008, casts=0.0, exposed=1.0,
        host=1.989e-3, torch=1.0,
    ),
    429 << 20,
)  # fmt: skip
"""benchmarks/results/planner.json: of ten runs the five not fitted on: time within 6 %. What a process takes at any
rate: benchmarks/results/train-memory.json, where five runs of `finemoe train` not fitted on are within 5 %."""


def here(processes: int = 1) -> Device:
    """Measure this machine, for so many processes at once.

    Args:
        processes: that will share its memory. Each is taken to reach what one reaches now: say so to torch, by threads.
    """
    available = memory.available_bytes() or 1 << 33
    return this_machine(
        product_flops=product_flops(), memory=available, bandwidth=bandwidth(), processes=processes, precision="fp32"
    )


Clock = Callable[[], float]


def product_flops(clock: Clock = time.perf_counter) -> float:
    """[FLOP/s] Of float32 products in this process, the best of a few: others may be at work."""
    left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    took = _best(lambda: left @ right, clock)
    return 2 * _SIDE**3 / took


def bandwidth(clock: Clock = time.perf_counter) -> float:
    """[bytes/s] Of a copy, read and written, the best of a few."""
    source, target = torch.ones(_COPIED), torch.empty(_COPIED)
    return 8 * _COPIED / _best(lambda: target.copy_(source), clock)


def _best(work: Callable[[], Any], clock: Clock) -> float:
    times = []
    for _ in range(_TURNS):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)
