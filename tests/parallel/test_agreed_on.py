"""What several processes of a run agree on before its first step, and what one of them says of it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from finemoe.core.config import merge
from finemoe.core.logs import logger
from finemoe.model.config import Kernels
from finemoe.parallel import seat
from finemoe.parallel.config import Layout
from finemoe.parallel.world import ROWS_FIGURE
from finemoe.runs import run as running
from finemoe.runs.calibration import Chosen
from finemoe.runs.config import RunConfig, resolve_run
from finemoe.runs.start import capacity_shares
from parallel.processes import run
from runs.tiny_runs import corpus, recipe, steps

__all__ = ["corpus"]

MOODS = ("loop", "sorted_slices")
"""Which kernels each rank would find fastest."""
DROPPING = {"model": {"feed_forward": {"capacity_factor": 1.0}}}


def observed(raw: dict[str, Any], out: Path) -> tuple[str, int, list[str]]:
    """The kernels that this process trains with, its threads, and what it says."""
    own = Kernels(experts=MOODS[int(os.environ["RANK"])], products="torch")  # type: ignore[arg-type]
    seen: list[tuple[str, int]] = []
    said: list[str] = []
    begin = running._trainer

    def beginning(config: RunConfig, method: Any, directory: Path, kernels: Kernels, *rest: Any) -> Any:
        seen.append((kernels.experts, torch.get_num_threads()))
        return begin(config, method, directory, kernels, *rest)

    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(7)
    with (
        patch.object(running, "kernels_for", lambda config, saved=None: Chosen(own, "")),
        patch.object(running, "_trainer", beginning),
    ):
        running.train(raw, out=out)
    [(experts, threads)] = seen
    return experts, threads, said


def test_one_process_chooses_and_speaks_for_all(corpus: Path, tmp_path: Path) -> None:
    """Kernels by rank 0, threads by all, capacity said once, and rows of the busiest process in the line of a step."""
    training = {"steps": 2, "threads": 0}
    raw = merge(recipe(corpus, "v3", training=training, parallel={"expert": 2}), DROPPING)
    out = tmp_path / "run"
    (experts, threads, said), (others, theirs, silence) = run(2, observed, raw, out, met=False)
    assert (experts, others) == (MOODS[0], MOODS[0])
    alone = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert threads == theirs == max(1, alone // 2)
    assert silence == []
    [capacity] = [line for line in said if "capacity_factor" in line]
    assert capacity.startswith("capacity_factor counts the micro-batches of each process by themselves (2)")
    assert json.loads((out / "summary.json").read_text())["capacity_shares"] == 2
    last = steps(out)[-1]
    assert last["dropped"] > 0
    [line] = [line for line in said if line.startswith("step 2/2")]
    assert line.split("  0 s left")[0].endswith(f"MaxVio {last['max_vio']:.2f} rows {last['figures'][ROWS_FIGURE]:.2f}")


def test_a_process_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    for local, share in ((None, 12), (1, 12), (4, 3), (5, 2), (13, 1)):
        monkeypatch.setenv("WORLD_SIZE", "64")  # those of other machines have cores of their own
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert seat.cores() == share


def test_a_capacity_is_counted_by_those_who_have_rows_of_their_own(corpus: Path) -> None:
    dropping = resolve_run(merge(recipe(corpus, "v3"), DROPPING), "recipe")
    assert capacity_shares(dropping, Layout(replicate=2, shard=2)) == 4
    assert capacity_shares(dropping, Layout(pipeline=2)) == 1
    assert capacity_shares(resolve_run(recipe(corpus, "v3"), "recipe"), Layout(shard=2)) == 1
