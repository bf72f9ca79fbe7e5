"""What a pipeline's schedule costs in closed form: time that ranks wait, and chunks of activations that they hold.

Formulas of 1F1B, ZB1P and DualPipe(V) as in DeepSeek-V3's Table 2, of interleaving as in Narayanan et al.
(2104.04473); that of ZBV we found on the simulated schedule. `timeline.simulate` is the judge of all of them.
DualPipe's supposes that a backward's part for the input takes as long as a forward, ZBV's that it takes longest of the
three; elsewhere the simulated schedule differs a little.
"""

from __future__ import annotations

import functools

from finemoe.parallel.planner.schedules import Schedule
from finemoe.parallel.planner.timeline import Costs, simulate


def bubble(schedule: Schedule, ranks: int, costs: Costs) -> float:
    """How long the rank that waits most waits in a step, whatever the number of micro-batches.

    Args:
        schedule: one of SCHEDULES.
        ranks: of the pipeline.
        costs: of ONE chunk: a rank's whole part for 1f1b, zb1p and dualpipe, half of it for zbv and dualpipev, the part
            of one virtual stage for interleaved. Sending is not counted.
    """
    forward, backward, weights = costs.forward, costs.backward, costs.weights
    waits = {
        "1f1b": (ranks - 1) * (forward + backward),
        "interleaved": (ranks - 1) * (forward + backward),
        "zb1p": (ranks - 1) * (forward + backward - 2 * weights),
        "zbv": (ranks - 1) * (backward - weights),
        "dualpipe": (ranks / 2 - 1) * (costs.both + backward - 3 * weights),
        "dualpipev": (ranks - 1) * (costs.both + backward - 3 * weights),
    }
    return waits[schedule] if ranks > 1 else 0.0


_SUPPOSING = frozenset({"zbv", "dualpipe", "dualpipev"})  # schedules whose formulas suppose something of the costs


def waits(schedule: Schedule, ranks: int, costs: Costs) -> float:
    """The same where a formula's suppositions do not hold: on the simulated schedule, to about 1 % of a chunk."""
    if ranks == 1 or schedule not in _SUPPOSING:
        return bubble(schedule, ranks, costs)
    whole = costs.forward + costs.backward
    parts = (round(part / whole, 2) for part in (costs.forward, costs.backward, costs.weights, costs.both))
    return whole * _simulated(schedule, ranks, *parts)


@functools.lru_cache(maxsize=1024)
def _simulated(schedule: Schedule, ranks: int, forward: float, backward: float, weights: float, both: float) -> float:
    count = 2 * ranks + 2 * (ranks % 2)  # more micro-batches add work, and no waiting
    return simulate(schedule, ranks, count, Costs(forward, backward, weights, both)).bubble


def chunks_held(schedule: Schedule, ranks: int, micro_batches: int, virtual: int = 1) -> int:
    """The most chunks of activations that a rank holds at once, on the rank that holds most.

    Args:
        schedule, ranks, micro_batches, virtual: as in `schedules.orders`; a chunk is as in `bubble`.
    """
    if ranks == 1:
        return virtual
    most = {
        "1f1b": min(ranks, micro_batches),
        "interleaved": min(2 * (ranks - 1) + (virtual - 1) * ranks + 1, micro_batches * virtual),
        "zb1p": min(ranks, micro_batches),
        "zbv": min(2 * ranks, 2 * micro_batches),
        "dualpipe": ranks + 1,
        "dualpipev": 2 * ranks + 1,
    }
    return most[schedule]


def chunks_of(schedule: Schedule, virtual: int = 1) -> int:
    """Into how many chunks a rank's part of the model is cut."""
    return virtual if schedule == "interleaved" else 2 if schedule in ("zbv", "dualpipev") else 1
