"""Placing experts for serving: the published example, and what every placement must be."""

from __future__ import annotations

import itertools
import random

import pytest

from finemoe.core.errors import ConfigError
from finemoe.parallel.planner.placement import in_order, pack, place, place_layers, replicate

# The example of EPLB's README: 12 experts in 4 groups, 16 slots on 8 devices of 2 nodes.
LOADS = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.mark.parametrize(("load", "slots"), list(zip(LOADS, SLOTS, strict=True)))
def test_the_published_example(load: list[float], slots: tuple[int, ...]) -> None:
    made = place(load, 8, redundant=4, groups=4, nodes=2)
    assert made.slots == slots
    assert made.hierarchical
    assert made.imbalance < in_order(load, 8)


def test_groups_stay_on_one_node() -> None:
    made = place(LOADS[0], 8, redundant=4, groups=4, nodes=2)
    homes = [{device // 4 for device, held in enumerate(made.on) if expert in held} for expert in range(12)]
    for group in range(4):
        assert len(set.union(*homes[group * 3 : group * 3 + 3])) == 1


@pytest.mark.parametrize(("devices", "redundant", "nodes"), [(4, 0, 1), (8, 4, 1), (4, 4, 2), (6, 6, 1), (12, 0, 1)])
def test_every_placement_holds_every_expert_and_as_many_a_device(devices: int, redundant: int, nodes: int) -> None:
    random.seed(devices)
    for _ in range(30):
        load = [random.expovariate(1) for _ in range(12)]
        made = place(load, devices, redundant=redundant, groups=4, nodes=nodes)
        assert set(made.slots) == set(range(12))
        assert sum(made.copies) == 12 + redundant
        assert len({len(held) for held in made.on}) == 1
        assert sum(made.device_load) == pytest.approx(sum(load))


def test_redundant_experts_go_where_the_load_is() -> None:
    assert replicate([10, 1, 1], 6) == [0, 1, 2, 0, 0, 0]
    assert replicate([4, 6], 4) == [0, 1, 1, 0]


def test_packing_is_near_the_best_there_is() -> None:
    weights = [7, 5, 4, 3, 2, 1]
    packed = pack(weights, 2)
    heaviest = max(sum(weights[i] for i in held) for held in packed)
    best = min(
        max(sum(weights[i] for i in half), sum(weights) - sum(weights[i] for i in half))
        for half in itertools.combinations(range(6), 3)
    )
    assert heaviest == best == 11
    assert all(len(held) == 3 for held in packed)


def test_layers_are_told_before_and_after() -> None:
    found = place_layers({"1": LOADS[0], "2": LOADS[1]}, 8, redundant=4, groups=4, nodes=2)
    assert found["before"] > found["after"] > 1
    assert found["layers"]["1"]["devices"][0] == [5, 6]
    assert found["layers"]["2"]["copies"][5] == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"devices": 5}, "take 3 redundant"),
        ({"devices": 8, "redundant": 3}, "take 4 redundant"),
        ({"devices": 0}, "cannot hold"),
        ({"devices": 9, "redundant": 6, "groups": 4, "nodes": 2}, "divide evenly"),
    ],
)
def test_what_cannot_be_held_is_refused(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        place(LOADS[0], **arguments)
    with pytest.raises(ConfigError, match="layer 3"):
        place_layers({"3": LOADS[0]}, **arguments)


def test_nothing_to_place() -> None:
    with pytest.raises(ConfigError, match="no layer routes"):
        place_layers({}, 4)
    assert place([0, 0], 2).imbalance == 1
