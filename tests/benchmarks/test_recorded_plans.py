"""What the recorded figures of the planner claim, taken from them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.parallel.planner.placement import place_layers
from finemoe.runs.planning.measured import HERE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_finemoes_own_memory_and_time_were_predicted_as_documented() -> None:
    rows = [row for row in recorded("planner.json")["settings"] if row["part"] == "judged"]
    memory = [abs(row["predicted_peak"] / row["peak"] - 1) for row in rows]
    seconds = [abs(row["predicted_seconds"] / row["seconds"] - 1) for row in rows]
    assert max(memory) < 0.055
    assert max(seconds) < 0.055
    assert sorted(seconds)[len(seconds) // 2] < 0.04


def test_constants_of_this_machine_are_those_that_were_recorded() -> None:
    found = recorded("planner.json")
    for name in ("bf16", "experts", "scores", "passes", "operands", "host"):
        assert getattr(HERE.constants, name) == pytest.approx(found["constants"][name], rel=2e-3)
    assert HERE.beside == pytest.approx(recorded("train-memory.json")["beside"], rel=2e-3)


def test_the_recorded_load_is_placed_as_recorded() -> None:
    found = recorded("placement.json")
    again = place_layers(found["loads"], found["gpus"], redundant=found["redundant"])
    assert again["layers"] == found["layers"]
    assert (round(again["before"], 2), round(again["after"], 2)) == (1.35, 1.01)
