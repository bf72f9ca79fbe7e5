"""What tracing costs beside plain evaluation of the same text.

python benchmarks/trace_cost.py RUN [CORPUS ...]

CORPUS as `finemoe trace --corpus` takes it; without one, what the run held out. Four ways of one pass take turns in one
process: summing losses (`plain`), the same with the routers' decisions kept (`record`), counting loads from them
(`count`), and writing the trace (`trace`). Medians of the rounds, as JSON on stdout: time by the clock, and that of the
processor in all threads, which other programs on the machine disturb less.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from finemoe.analysis.load import tally
from finemoe.analysis.passages import Observed, Passages, observe, read_passages
from finemoe.analysis.trace import trace_info, write_trace
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.environment import environment

TOKENS, ROUNDS = 120_000, 7


def summed(observed: Iterable[Observed]) -> float:
    """Nats of the text."""
    return sum(float((one.losses * one.batch.weights).sum()) for one in observed)


def ways(opened: LanguageModel, passages: list[Passages], out: Path) -> dict[str, Callable[[], object]]:
    """One pass over the text each."""

    def run(record: bool) -> Iterable[Observed]:
        return observe(opened, passages, record=record, description=None)

    return {
        "plain": lambda: summed(run(False)),
        "record": lambda: summed(run(True)),
        "count": lambda: tally(opened, passages, description=None),
        "trace": lambda: summed(write_trace(out, opened, passages, run(True), {})),
    }


def measure(run: str, corpora: list[str]) -> dict[str, Any]:
    """Seconds of each way, and their ratios to plain evaluation."""
    opened = open_language_model(run)
    passages = read_passages(opened, corpora=corpora, tokens=TOKENS // max(1, len(corpora)))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trace.parquet"
        todo = ways(opened, passages, out)
        seconds: dict[str, list[float]] = {name: [] for name in todo}
        processor: dict[str, list[float]] = {name: [] for name in todo}
        for number in range(ROUNDS + 1):  # the first round warms up
            for name, once in todo.items():
                started, busy = time.perf_counter(), time.process_time()
                once()
                if number:
                    seconds[name].append(time.perf_counter() - started)
                    processor[name].append(time.process_time() - busy)
        rows, size = trace_info(out).rows, out.stat().st_size
    return {
        "model": run,
        "tokens": sum(passage.num_targets for passage in passages),
        "rows": rows,
        "bytes_per_row": round(size / rows, 1),
        "rounds": ROUNDS,
        "wall_clock": figures(seconds),
        "processor": figures(processor),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "machine": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }


def figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """All rounds, their medians, and the medians over that of plain evaluation."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "ratio_to_plain": {name: round(value / medians["plain"], 3) for name, value in medians.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:]), indent=1))
