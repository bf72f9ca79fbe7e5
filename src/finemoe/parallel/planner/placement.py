"""Which device of a serving unit holds which experts, with copies of those most asked for.

DeepSeek's expert-parallel load balancer (EPLB), written from its description (DeepSeek-V3 section 3.4 and the project's
README): experts that are loaded most get copies; copies are packed onto devices, each the same number, the heaviest
first onto the device that has least. Hierarchical: groups of experts go to nodes first, so that a group-limited router
stays within few nodes; global: everything as if on one node.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemoe.core.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Of one layer."""

    slots: tuple[int, ...]
    """The expert in each slot; slots lie on devices in order, equally many each."""
    devices: int
    load: tuple[float, ...]
    """Of each expert, as recorded."""
    hierarchical: bool

    @property
    def on(self) -> tuple[tuple[int, ...], ...]:
        """Experts on each device."""
        each = len(self.slots) // self.devices
        return tuple(self.slots[i * each : (i + 1) * each] for i in range(self.devices))

    @property
    def copies(self) -> tuple[int, ...]:
        """Of each expert."""
        return tuple(self.slots.count(expert) for expert in range(len(self.load)))

    @property
    def device_load(self) -> tuple[float, ...]:
        """Of each device, an expert's load shared equally by its copies."""
        return tuple(sum(self.load[e] / self.copies[e] for e in held) for held in self.on)

    @property
    def imbalance(self) -> float:
        """Largest over mean load of the devices: how many times as long the others wait."""
        return _imbalance(self.device_load)


def place(load: Sequence[float], devices: int, *, redundant: int = 0, groups: int = 1, nodes: int = 1) -> Placement:
    """Place the experts of one layer.

    Args:
        load: of each expert: tokens, or anything in proportion.
        devices: that hold them, each the same number.
        redundant: slots beyond one an expert.
        groups: of consecutive experts, as of the router; 1: none.
        nodes: the devices lie on. Where they divide the groups the placement is hierarchical, else global.

    Raises:
        ConfigError: slots, devices, nodes and groups do not go together.
    """
    experts, slots = len(load), len(load) + redundant
    if not experts or devices < 1 or slots % devices:
        spare = -slots % devices if devices > 0 else 0
        raise ConfigError(
            f"{experts} experts and {redundant} redundant ones are {slots} slots, which {devices} devices cannot hold "
            f"equally: take {redundant + spare} redundant ones, or another number of devices"
        )
    if min(load) < 0:
        raise ConfigError("a load below 0 is none")
    hierarchical = nodes > 1 and groups > 1 and groups % nodes == 0
    if not hierarchical:
        groups = nodes = 1
    if experts % groups or devices % nodes or slots % nodes:
        raise ConfigError(
            f"{experts} experts in {groups} groups, {slots} slots on {devices} devices of {nodes} nodes: each must "
            "divide evenly"
        )
    size = experts // groups
    totals = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    made: list[int] = []
    for held in pack(totals, nodes):
        own = [group * size + i for group in held for i in range(size)]
        made += _on_node([load[e] for e in own], own, slots // nodes, devices // nodes)
    return Placement(tuple(made), devices, tuple(map(float, load)), hierarchical)


def _on_node(load: Sequence[float], experts: Sequence[int], slots: int, devices: int) -> list[int]:
    held = replicate(load, slots)
    shares = [load[i] / held.count(i) for i in held]
    return [experts[held[slot]] for packed in pack(shares, devices) for slot in packed]


def replicate(load: Sequence[float], slots: int) -> list[int]:
    """The expert of each slot: one each in order, then one more of whichever has most load a copy."""
    held, copies = list(range(len(load))), [1] * len(load)
    for _ in range(slots - len(load)):
        most = max(range(len(load)), key=lambda i: load[i] / copies[i])
        held.append(most)
        copies[most] += 1
    return held


def pack(weights: Sequence[float], bins: int) -> list[list[int]]:
    """Put items into bins of equally many, the heaviest first, always into the lightest that has room.

    Returns:
        Indices of the items in each bin, in the order in which they came.
    """
    room = len(weights) // bins
    if room == 1:
        return [[i] for i in range(bins)]
    packed: list[list[int]] = [[] for _ in range(bins)]
    totals = [0.0] * bins
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        free = min((b for b in range(bins) if len(packed[b]) < room), key=lambda b: totals[b])
        packed[free].append(item)
        totals[free] += weights[item]
    return packed


def in_order(load: Sequence[float], devices: int) -> float:
    """Imbalance of experts that lie in their order, as near to equally many a device as can be: without a plan."""
    bounds = [round(i * len(load) / devices) for i in range(devices + 1)]
    return _imbalance([sum(load[low:high]) for low, high in itertools.pairwise(bounds)])


def _imbalance(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0


def place_layers(
    loads: Mapping[str, Sequence[float]], devices: int, *, redundant: int = 0, groups: int = 1, nodes: int = 1
) -> dict[str, Any]:
    """Place every layer of a recorded load.

    Args:
        loads: of the experts of each layer, by its number.
        devices, redundant, groups, nodes: as of `place`.

    Returns:
        JSON-able: for each layer its slots by device, copies, and the imbalance of devices before (experts in order,
        no copies) and after; and the mean of both over layers.

    Raises:
        ConfigError: as `place`; with the layer.
    """
    layers: dict[str, dict[str, Any]] = {}
    for number, load in loads.items():
        try:
            made = place(load, devices, redundant=redundant, groups=groups, nodes=nodes)
        except ConfigError as error:
            raise ConfigError(f"layer {number}: {error}") from error
        layers[number] = {
            "devices": [list(held) for held in made.on],
            "copies": list(made.copies),
            "device_load": list(made.device_load),
            "before": in_order(load, devices),
            "after": made.imbalance,
            "hierarchical": made.hierarchical,
        }
    if not layers:
        raise ConfigError("no layer routes: there is nothing to place")
    means = {when: sum(layer[when] for layer in layers.values()) / len(layers) for when in ("before", "after")}
    return {"gpus": devices, "redundant": redundant, "groups": groups, "nodes": nodes, **means, "layers": layers}
