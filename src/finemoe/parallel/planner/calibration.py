"""The planner's constants: fitted on half of the published points, judged on the other half. Nothing is set by hand.

Each constant has a prior, written down before the fit: what is usual on such devices, within a factor of about 1.35 (a
standard deviation of 0.3 of its logarithm). Points weigh alike, with an error of 12 % each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from finemoe.model.config import ModelConfig
from finemoe.parallel.planner.devices import Device, find_device
from finemoe.parallel.planner.published import BESIDE, FITTED, JUDGED, V3_RUN, Point, model_of
from finemoe.parallel.planner.setup import Setup
from finemoe.parallel.planner.step_time import Constants, step_time

PRIOR = Constants(bf16=0.65, fp8=0.5, experts=0.7, scores=0.5, passes=3.0, exposed=0.4, host=2e-3, torch=1.5)
_SPREAD = 0.3
_ERROR = 0.12


def setup_of(point: Point) -> Setup:
    """A published run as a setup: weights whole on every process, moments spread (ZeRO-1), as those systems do."""
    data = point.devices // (point.tensor * point.pipeline * point.context)
    return Setup(
        sequences=point.sequences, seq_len=point.seq_len, micro_batch=point.micro_batch, precision=point.precision,
        pipeline=point.pipeline, shard=data, context=point.context, expert=point.expert, schedule=point.schedule,
        virtual=point.virtual, tensor=point.tensor, gather="step", reduce="step",
    )  # fmt: skip


def predicted_rate(point: Point, constants: Constants) -> float:
    """[tokens/s] A device, for a published run."""
    setup = setup_of(point)
    own = constants.with_torch() if point.stack == "torch" else constants
    took = step_time(model_of(point.model), setup, find_device(point.device), own).total
    return setup.tokens_per_step / took / point.devices


def fit(points: Sequence[Point] = FITTED) -> Constants:
    """The constants that explain `points` best, and stay near their priors where the points do not say."""
    from scipy.optimize import least_squares  # half a second, and a plan needs none of it

    prior = [math.log(value) for value in astuple(PRIOR)]

    def misses(logs: Any) -> list[float]:
        constants = Constants(*(math.exp(value) for value in logs))
        found = [math.log(predicted_rate(point, constants) / point.rate) / _ERROR for point in points]
        return found + [(value - usual) / _SPREAD for value, usual in zip(logs, prior, strict=True)]

    return Constants(*(math.exp(value) for value in least_squares(misses, prior).x))
