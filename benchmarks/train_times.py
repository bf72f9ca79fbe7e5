"""What a step of `finemoe train` takes here with default kernels, as `finemoe plan --device here` says and measured.

python benchmarks/train_times.py [OUT.json]    # writes benchmarks/results/train-times.json, three minutes

Of each recipe in turn, three times: the plan, which measures the machine, and a run of a few steps in a process of its
own; of that the median step without the first ones. Nothing else should run on the machine meanwhile. The planner's
constants are of a bare loop with torch's kernels (`planner.py`); nothing is fitted here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

RECIPES = ("tiny", "ladder/v1", "ladder/v2", "ladder/v3")
TURNS, STEPS, FIRST = 3, 24, 4
RESULT = Path(__file__).parent / "results" / "train-times.json"


def _finemoe(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "finemoe", *words], check=True, capture_output=True, text=True)
    return done.stdout


def planned(recipe: str) -> float:
    """[s] A step."""
    plan = json.loads(_finemoe("plan", recipe, "--gpus", "1", "--device", "here", "--json"))
    return float(plan["step"]["seconds"]["value"])


def measured(recipe: str) -> float:
    """[s] The median step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        length = (f"training.steps={STEPS}", "training.evaluate_every=1000")
        settings = [word for one in length for word in ("--set", one)]
        _finemoe("train", recipe, "--out", str(out), "--quiet", *settings)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [record["seconds"] for line in lines if (record := json.loads(line))["kind"] == "step"]
    return statistics.median([end - begin for begin, end in pairwise(ends)][FIRST:])


def main() -> None:
    """Measure all of them and write what came of it."""
    from finemoe.core.environment import environment

    result = Path(sys.argv[1]) if sys.argv[1:] else RESULT
    load = os.getloadavg()
    rows: list[dict[str, Any]] = [{"recipe": recipe, "planned": [], "measured": []} for recipe in RECIPES]
    for _ in range(TURNS):
        for row in rows:
            recipe = str(Path(__file__).parents[1] / "recipes" / f"{row['recipe']}.toml")
            row["planned"].append(planned(recipe))
            row["measured"].append(measured(recipe))
    for row in rows:
        row["ratios"] = [took / said for took, said in zip(row["measured"], row["planned"], strict=True)]
        low, middle, high = (1000 * find(row["measured"]) for find in (min, statistics.median, max))
        said = 1000 * statistics.median(row["planned"])
        ratios = ", ".join(f"{one:.2f}" for one in row["ratios"])
        print(f"{row['recipe']:10} planned {said:4.0f} ms, measured {middle:4.0f} ({low:.0f} to {high:.0f}): {ratios}")
    facts = {"kind": "train-times", "steps": STEPS, "load_average": load, "machine": environment()}
    result.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
