"""A plan: what one run on many processes takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.parallel.planner.calibration import CONSTANTS, errors_of, predicted_rate, system_factor
from finemoe.parallel.planner.devices import Device
from finemoe.parallel.planner.flops import Flops, training_flops
from finemoe.parallel.planner.memory import BESIDE, Memory, memory_of_ranks, peak_memory
from finemoe.parallel.planner.published import BESIDE as MORE
from finemoe.parallel.planner.published import FITTED, POINTS, V3_RUN, V3_TOKENS, Point
from finemoe.parallel.planner.setup import Piece, Setup, parameters_of, pieces_of_ranks
from finemoe.parallel.planner.step_time import Constants, StepTime, costs, step_time
from finemoe.parallel.planner.timeline import Timeline, simulate
from finemoe.parallel.planner.traffic import Collective, collectives

Calibration = Literal["torch", "tuned", "deepseek-v3"]
CALIBRATIONS: dict[Calibration, str] = {
    "torch": "constants fitted on half of the published runs, with PyTorch's kernels (finemoe's own case)",
    "tuned": "constants fitted on half of the published runs, with kernels made for the device",
    "deepseek-v3": "as tuned, times one factor fitted on DeepSeek-V3's published run itself",
}
GIB = 1 << 30
_HERE = (0.9, 1.82)
"""Of a time that is planned for a machine that was measured: where four of five steps of `finemoe train` with its own
kernels lay, by benchmarks/train_times.py on a processor that nothing was fitted on."""
_APART = 0.1  # between layouts of one machine, which share what is wrong with all


@dataclass(frozen=True)
class Interval:
    """A time, and between which four of five runs that were not fitted on would lie."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        """The same in another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    model: str
    device: Device
    setup: Setup
    parameters: int
    flops: Flops
    """Of one token, forward and back, the causal half of scores."""
    even: tuple[Memory, ...]
    """Of each rank of the pipeline, experts used evenly: MaxVio 0."""
    uneven: Memory
    """Of the rank that takes most, where a process's experts receive twice their share: MaxVio 1."""
    exchanges: tuple[Collective, ...]
    """Of the rank of the pipeline that moves most."""
    time: StepTime
    time_uneven: StepTime
    calibration: Calibration
    seconds: Interval
    """Of a step."""
    tokens: float | None
    """Of the whole run."""

    @property
    def peak(self) -> Memory:
        """Of the rank that takes most."""
        return max(self.even, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """With evenly used experts."""
        return self.peak.total <= self.device.memory

    @property
    def rate(self) -> Interval:
        """[tokens/s] A device."""
        each = self.setup.tokens_per_step / self.setup.processes
        return Interval(each / self.seconds.value, each / self.seconds.high, each / self.seconds.low)

    @property
    def hours(self) -> Interval | None:
        """[device-hours] Of the whole run."""
        if self.tokens is None:
            return None
        return self.seconds.times(self.tokens / self.setup.tokens_per_step * self.setup.processes / 3600)

    @property
    def model_flops(self) -> float:
        """[FLOP/s] A device, useful ones alone."""
        return self.rate.value * self.flops.total

    @property
    def bubble(self) -> float:
        """[share] Of a step, that the rank that waits most waits for its neighbours."""
        return self.time.bubble / self.time.total

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        low, high = self.rate.low, self.rate.high
        return {
            "model": self.model,
            "device": {**asdict(self.device), "peak": dict(self.device.peak)},
            "setup": asdict(self.setup),
            "layout": str(self.setup),
            "batch": self.setup.batch,
            "processes": self.setup.processes,
            "on": self.device.counted(self.setup.processes),
            "tokens_per_step": self.setup.tokens_per_step,
            "parameters": self.parameters,
            "flops_per_token": {**asdict(self.flops), "total": self.flops.total},
            "memory": {
                "available": self.device.memory,
                "fits": self.fits,
                "even": [memory.to_dict() for memory in self.even],
                "peak": self.peak.to_dict(),
                "uneven": self.uneven.to_dict(),
                "fits_uneven": self.uneven.total <= self.device.memory,
            },
            "exchanges": [one.to_dict() for one in self.exchanges],
            "step": {
                "seconds": asdict(self.seconds),
                "parts": self.time.to_dict(),
                "uneven_seconds": self.time_uneven.total,
                "bubble": self.bubble,
                "micro_batches": self.setup.micro_batches,
            },
            "tokens_per_second": {"value": self.rate.value, "low": low, "high": high},
            "model_flops": self.model_flops,
            "utilisation": self.model_flops / self.device.flops(self.setup.precision),
            "tokens": self.tokens,
            "device_hours": None if self.hours is None else asdict(self.hours),
            "calibration": {
                "name": self.calibration,
                "is": CALIBRATIONS[self.calibration],
                "errors": errors_of(self.device.family).to_dict(),
                "factor": system_factor() if self.calibration == "deepseek-v3" else 1.0,
            },
        }


def plan(
    config: ModelConfig,
    setup: Setup,
    device: Device,
    *,
    name: str = "model",
    tokens: float | None = None,
    calibration: Calibration = "torch",
    constants: Constants | None = None,
    beside: int = BESIDE,
) -> Plan:
    """What a run takes. Nothing is refused here for being too large: `fits` says it.

    Args:
        config, setup, device: what runs how on what. With a calibration other than torch, rows cross the network once a
            node, and weights and stages' states travel in 16 bits.
        name: of the model, in what is shown.
        tokens: of the whole run, for device-hours.
        calibration: one of CALIBRATIONS.
        constants: of a machine that was measured, in place of the fitted ones; its interval is then _HERE.
        beside: [bytes] what a process takes at any rate.

    Raises:
        ConfigError: a layout that cannot be, or an unknown calibration.
    """
    if calibration not in CALIBRATIONS:
        raise ConfigError(f"calibration {calibration!r}: known are {', '.join(CALIBRATIONS)}")
    other_system = calibration != "torch"
    setup = replace(setup, once_a_node=other_system, narrow=other_system, graphs=False)
    own = constants_of(device, calibration, constants)
    factor = system_factor() if calibration == "deepseek-v3" else 1.0
    took = step_time(config, setup, device, own)
    even = memory_of_ranks(config, setup, beside=beside)
    errors = errors_of(device.family)
    low, high = _HERE if constants else (min(errors.low, 1.0), max(errors.high, 1.0))
    seconds = took.total * factor
    moved = [collectives(config, setup, held) for held in pieces_of_ranks(config, setup)]
    return Plan(
        model=name,
        device=device,
        setup=setup,
        parameters=_parameters(config),
        flops=training_flops(config, setup.seq_len),
        even=tuple(even),
        uneven=peak_memory(config, setup, 1.0, beside),
        exchanges=tuple(max(moved, key=lambda found: sum(one.total for one in found))),
        time=took,
        time_uneven=step_time(config, setup, device, own, 1.0),
        calibration=calibration,
        seconds=Interval(seconds, seconds * low, seconds * high),
        tokens=tokens,
    )


def constants_of(device: Device, calibration: Calibration, constants: Constants | None) -> Constants:
    """Those that times on `device` are made with: of a machine that was measured its own `constants`."""
    own = constants or CONSTANTS["hopper" if device.family == "here" else device.family]
    return own.with_torch() if calibration == "torch" else own


def error_told(device: Device, constants: Constants | None) -> float:
    """[share] How far apart two times must lie for the planner to tell them apart: its usual error."""
    return _APART if constants else errors_of(device.family).median


def _parameters(config: ModelConfig) -> int:
    whole = parameters_of(config, (Piece(tuple(range(len(config.blocks))), True, True),))
    return whole.blocks + whole.experts + whole.root


def does_not_fit(made: Plan) -> str:
    """In words: the memory of the rank that takes most, part by part, and what there is."""
    peak = made.peak
    parts = {name: size for name, size in peak.to_dict().items() if name != "total" and size}
    listed = ", ".join(
        f"{name.replace('_', ' ')} {size / GIB:,.2f}" for name, size in sorted(parts.items(), key=lambda one: -one[1])
    )
    who = f"rank {made.even.index(peak)} of the pipeline" if made.setup.pipeline > 1 else "each process"
    return (
        f"{made.model} with {made.setup} and {made.setup.batch} does not fit {made.device.name}: {who} needs "
        f"{peak.total / GIB:,.2f} GiB, and there are {made.device.memory / GIB:.2f}. In GiB: {listed}."
    )


def picture(config: ModelConfig, made: Plan, constants: Constants | None = None, most: int = 24) -> Timeline | None:
    """The time line of a step: with fewer micro-batches where there are many, since its ends are the same.

    Args:
        config: of the model.
        made: its plan.
        constants: as of `plan`.
        most: micro-batches shown, if the schedule can do with so few.
    """
    setup = made.setup
    if setup.pipeline == 1:
        return None
    own = constants or CONSTANTS["hopper" if made.device.family == "here" else made.device.family]
    count = min(setup.micro_batches, max(most, 2 * setup.pipeline))
    count -= count % setup.pipeline if setup.schedule == "interleaved" else count % 2 if count > setup.pipeline else 0
    return simulate(setup.schedule, setup.pipeline, count, costs(config, setup, made.device, own), setup.virtual)


def published_beside(device: Device) -> list[dict[str, Any]]:
    """Published runs on this device, each with what the planner says of it, and whether it was fitted on it."""
    found: Sequence[Point] = [point for point in (*POINTS, *MORE) if point.device == device.name]
    rows = []
    for point in found:
        said = predicted_rate(point, CONSTANTS)
        fitted = point in FITTED
        rows.append(
            {"name": point.name, "measured": point.rate, "predicted": said, "fitted": fitted, "source": point.source}
        )
    return rows


def v3_run() -> dict[str, float]:
    """DeepSeek-V3's published run: device-hours as printed, as predicted, and the factor between the two."""
    hours = V3_TOKENS / predicted_rate(V3_RUN, CONSTANTS) / 3600
    return {
        "tokens": V3_TOKENS,
        "published_hours": V3_TOKENS / V3_RUN.rate / 3600,
        "predicted_hours": hours,
        "factor": system_factor(),
        "with_factor_hours": hours * system_factor(),
    }
