"""Figures of the planner that stand in documents, recomputed from what stands there, or from what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from benchmarks.train_memory import RESULT, judged

import finemoe
from finemoe.model import native
from finemoe.runs.planning.measured import HERE

PAGE = Path(__file__).parents[2] / "docs/howto/train-on-many-machines.md"
ROWS = re.findall(r"^\| (\d+) \| ([\d.]+ \(.*\)) \| ([\d.]+) \| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_how_a_run_grows_with_devices_is_what_the_command_beside_the_table_says(row: tuple[str, ...]) -> None:
    assert len(ROWS) == 3
    command = "finemoe plan deepseek-moe-16b --gpus N --device h100 --set parallel.expert=N --json"
    assert f"`{command}`, experts over 64 at most" in PAGE.read_text()
    devices = int(row[0])
    made = finemoe.plan("deepseek-moe-16b", devices, "h100", overrides=[f"parallel.expert={min(devices, 64)}"])
    seconds = made["step"]["seconds"]
    sent = {one["name"]: one["total"] / 1e9 for one in made["exchanges"]}
    rows = sum(size for name, size in sent.items() if name.startswith(("dispatch", "combine")))
    weights = sum(size for name, size in sent.items() if name.startswith(("gather", "sum")))
    assert row[1:] == (
        f"{seconds['value']:.2f} ({seconds['low']:.2f} to {seconds['high']:.2f})",
        f"{made['step']['parts']['exchange']:.2f}",
        f"{rows:.0f}",
        f"{weights:.0f}",
    )


@pytest.mark.skipif(not native.available(), reason="the figures are of our kernels")
def test_memory_of_finemoe_train_here_is_what_the_page_says() -> None:
    """Of six runs that were measured, by the planner as it is now."""
    page = (Path(__file__).parents[2] / "docs/howto/plan-a-run.md").read_text()
    recorded = json.loads(RESULT.read_text())
    found = judged([row["peak"] for row in recorded["runs"]])
    assert found["runs"] == recorded["runs"]
    assert HERE.beside == pytest.approx(found["beside"], abs=1 << 20)
    assert found["worst"] < 0.05
    for row in found["runs"]:
        error = f"{100 * row['error']:+.1f} %" if row["part"] == "judged" else "fitted"
        assert f"| {row['name']} | {row['planned'] / 2**20:.0f} | {row['peak'] / 2**20:.0f} | {error} |" in page
