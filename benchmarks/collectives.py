"""What each collective of a step costs: a recipe by two processes of this machine, a few steps under torch's profiler.

python -m benchmarks.collectives                       # the V3 ladder; writes benchmarks/results/collectives.json
python -m benchmarks.collectives RECIPE --steps 8

Times are those of the first process, from when it enters until it has what it waited for: waiting for the other, which
may still compute, is in them. On gloo they are of its own threads, so they may overlap one another. A collective is
called as it was asked for: gloo runs all-reduces for reduce-scatters, which are told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "collectives.json"
LAYOUTS = {
    "experts by all-to-all": ("parallel.expert=2",),
    "FSDP2": ("parallel.shard=2",),
    "replicas": ("parallel.replicate=2",),
    "stages": ("parallel.pipeline=2", "training.micro_batch_tokens=1024"),
    "sequences in pieces": ("parallel.context=2", "parallel.shard=1", "model.mtp_depth=0"),
}
"""Settings of each. A sequence in pieces has no prediction modules."""
_WARM = 8  # steps before the first that is measured


def measure(recipe: str, layout: Sequence[str], steps: int) -> dict[str, Any]:
    """`steps` steps of `recipe` by two processes: milliseconds and calls a step, by collective."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, recipe,
            "--steps", str(steps), "--layout", *layout, "--inside", str(found),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not found.exists():
            raise SystemExit(f"{layout}: {done.stderr[-2000:]}")
        return dict(json.loads(found.read_text()))


def inside(recipe: str, layout: Sequence[str], steps: int, found: Path) -> None:
    """One of the two processes: train, and write what the first saw."""
    from torch.profiler import ProfilerActivity, profile

    from finemoe.runs.config import read_recipe, resolve_run
    from finemoe.runs.run import train
    from finemoe.training.trainer import Trainer

    real, held = Trainer.step, profile(activities=[ProfilerActivity.CPU])
    state = {"step": 0, "began": 0.0}

    def step(self: Trainer, *given: Any, **named: Any) -> Any:
        state["step"] += 1
        if state["step"] == _WARM + 1:
            held.__enter__()
            state["began"] = time.perf_counter()
        report = real(self, *given, **named)
        if state["step"] == _WARM + steps:
            seconds = time.perf_counter() - state["began"]
            held.__exit__(None, None, None)
            if self.world.rank == 0:
                found.write_text(json.dumps(_read(held, seconds, steps)))
        return report

    Trainer.step = step  # type: ignore[method-assign]
    config = resolve_run(*read_recipe(recipe, layout))
    length = {
        "tokens": None,
        "steps": _WARM + steps,
        "evaluate_every": 10_000,
        "checkpoint_every": 10_000,
    }  # they would count
    training = config.training.model_copy(update=length)
    train(config.model_copy(update={"training": training}), out=found.parent / "run", quiet=True)


def _read(held: Any, seconds: float, steps: int) -> dict[str, Any]:
    return {"step_milliseconds": round(1e3 * seconds / steps, 1), "collectives": by_name(held.events(), steps)}


def by_name(events: Iterable[Any], steps: int) -> dict[str, dict[str, float]]:
    """Calls and milliseconds a step of each collective.

    gloo runs one or two all-reduces for a reduce-scatter: they belong to the last of the two that torch was asked for.
    """
    events = sorted(events, key=lambda event: event.time_range.start)
    spans: dict[tuple[str, int], tuple[float, float]] = {}
    name, number = "all_reduce", 0
    for count, event in enumerate(events):
        if event.name.startswith("c10d::") and "reduce" in event.name:
            name, number = "reduce_scatter" if "reduce_scatter" in event.name else "all_reduce", count
        if not event.name.startswith(("gloo:", "nccl:")):
            continue
        began, ended = event.time_range.start, event.time_range.end
        own = event.name.partition(":")[2]
        key = (name, number) if own == "all_reduce" else (own, count)
        first, last = spans.get(key, (began, ended))
        spans[key] = min(first, began), max(last, ended)
    found: dict[str, dict[str, float]] = {}
    for (name, _), (began, ended) in spans.items():
        one = found.setdefault(name, {"calls": 0.0, "milliseconds": 0.0})
        one["calls"] += 1 / steps
        one["milliseconds"] += (ended - began) / 1e3 / steps
    return {name: {key: round(value, 2) for key, value in one.items()} for name, one in found.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Measure every layout and write the result, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/ladder/v3.toml")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layout", nargs="*", default=())
    parser.add_argument("--inside", type=Path)
    asked = parser.parse_args(given)
    if asked.inside is not None:
        inside(asked.recipe, asked.layout, asked.steps, asked.inside)
        return
    found = {name: measure(asked.recipe, layout, asked.steps) for name, layout in LAYOUTS.items()}
    for name, one in found.items():
        print(f"{name}: a step of {one['step_milliseconds']} ms")
        for collective, cost in one["collectives"].items():
            print(f"  {collective:16} {cost['calls']:6.1f} calls {cost['milliseconds']:9.2f} ms")
    load = os.getloadavg()[0]
    facts = {"recipe": asked.recipe, "steps": asked.steps, "machine": platform.machine(), "cores": os.cpu_count()}
    RESULT.write_text(json.dumps({**facts, "load": round(load, 2), "layouts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
