"""Every layout of so many devices that fits, the fastest first; uneven experts decide between like ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.devices import Device
from finemoe.parallel.planner.memory import BESIDE, peak_memory
from finemoe.parallel.planner.plan import Calibration, Plan, constants_of, error_told, plan
from finemoe.parallel.planner.schedules import Schedule
from finemoe.parallel.planner.setup import Setup, at_once
from finemoe.parallel.planner.step_time import Constants, step_time

_FASTER: tuple[Schedule, ...] = ("1f1b", "interleaved", "zbv", "dualpipev")


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    plans: tuple[Plan, ...]
    """The fastest, in order; one that does not fit at MaxVio 1 as if it were slower by the error of times."""
    tried: int
    fitting: int
    impossible: int
    """Layouts that a schedule, the batch or the model's shape rules out."""
    nearest: str = ""
    """Where none fits, how near the nearest comes."""


def search(
    config: ModelConfig,
    setup: Setup,
    processes: int,
    device: Device,
    *,
    name: str = "model",
    tokens: float | None = None,
    calibration: Calibration = "torch",
    most: int = 10,
    refuse: Callable[[Layout], None] = lambda layout: None,
    constants: Constants | None = None,
    beside: int = BESIDE,
) -> Found:
    """Rank the layouts of `processes`.

    Args:
        config, device: what, on what.
        setup: batch, length, precision, and how often weights are gathered; its layout is replaced. finemoe has no
            tensor parallelism, and neither has the search.
        processes: to be laid out.
        name, tokens, calibration, constants, beside: as of `plan`.
        most: plans returned.
        refuse: raises ConfigError for a layout that is not to be among them, as one that finemoe does not train by.

    Raises:
        ConfigError: no layout can be, and why.
    """
    own, doubt = constants_of(device, calibration, constants), 1 + error_told(device, constants)
    timed: list[tuple[float, Setup]] = []
    tried = impossible = 0
    least, first = 0, ""
    nearest: Setup | None = None
    for changes in _layouts(config, setup, processes):
        tried += 1
        try:
            one = _laid(setup, changes, refuse, other_system=calibration != "torch")
            needed = peak_memory(config, one, beside=beside).total
        except ConfigError as error:
            first = first or str(error)
            impossible += 1
            continue
        if needed > device.memory:
            if nearest is None or needed < least:
                least, nearest = needed, one
            continue
        drifts = peak_memory(config, one, 1.0, beside).total > device.memory
        # One that dies when its router drifts stands behind those that do not and are not clearly slower.
        timed.append((step_time(config, one, device, own).total * (doubt if drifts else 1.0), one))
    if not timed and nearest is None:
        raise ConfigError(f"{name}: none of {tried} layouts of {processes} processes can be. The first: {first}")
    if not timed and nearest is not None:
        return Found((), tried, 0, impossible, _nearest(name, tried, processes, device, nearest, least))
    timed.sort(key=lambda pair: pair[0])
    told: dict[str, Any] = {"name": name, "tokens": tokens, "calibration": calibration}
    best = (plan(config, one, device, **told, constants=constants, beside=beside) for _, one in timed[:most])
    return Found(tuple(best), tried, len(timed), impossible)


def _nearest(name: str, tried: int, processes: int, device: Device, nearest: Setup, least: int) -> str:
    return (
        f"{name}: none of {tried} layouts of {device.counted(processes)} fits {device.memory / 2**30:.1f} GiB; the "
        f"nearest, {nearest}, needs {least / 2**30:,.1f}."
    )


def first_fit(
    config: ModelConfig,
    setup: Setup,
    processes: int,
    device: Device,
    *,
    refuse: Callable[[Layout], None] = lambda layout: None,
    calibration: Calibration = "torch",
    beside: int = BESIDE,
) -> Setup | None:
    """Some layout of `processes` that fits, simple ones first; None where there is none. Arguments as of `search`."""
    for changes in _layouts(config, setup, processes):
        with suppress(ConfigError):
            one = _laid(setup, changes, refuse, other_system=calibration != "torch")
            if peak_memory(config, one, beside=beside).total <= device.memory:
                return one
    return None


def _layouts(config: ModelConfig, setup: Setup, processes: int) -> Iterator[dict[str, Any]]:
    experts = [
        block.feed_forward.num_routed_experts for block in config.blocks if isinstance(block.feed_forward, MoEConfig)
    ]
    for pipeline in _powers(min(processes, len(config.blocks))):
        if processes % pipeline:
            continue
        left = processes // pipeline
        for replicate in sorted({1, 2, 4, 8, left}):  # `left`: nothing sharded, which a V wants
            shard = left // replicate
            if left % replicate or not shard:
                continue
            for expert in _powers(min(shard, min(experts, default=1))):
                if shard % expert or any(count % expert for count in experts):
                    continue
                for schedule in _FASTER if pipeline > 1 else _FASTER[:1]:
                    yield from _ways(
                        {"pipeline": pipeline, "replicate": replicate, "shard": shard, "expert": expert, "context": 1,
                         "schedule": schedule, "virtual": 2 if schedule == "interleaved" else 1}
                    )  # fmt: skip


def _laid(setup: Setup, changes: dict[str, Any], refuse: Callable[[Layout], None], other_system: bool) -> Setup:
    """`setup` by another layout, with as many sequences at once as that leaves to a process.

    Raises:
        ConfigError: it cannot be.
    """
    sizes = {name: changes[name] for name in ("pipeline", "replicate", "shard", "context", "expert", "schedule")}
    layout = Layout(**sizes)
    refuse(layout)
    micro = at_once(setup.sequences, layout.data, setup.micro_batch)
    return replace(setup, **changes, micro_batch=micro, tensor=1, once_a_node=other_system, narrow=other_system)


def _ways(layout: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for recompute in (False, True):
        yield {**layout, "recompute": recompute}


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2
