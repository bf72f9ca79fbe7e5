"""R1-Zero in miniature over several seeds, and variants of GRPO from the same beginnings.

OMP_WAIT_POLICY=passive python benchmarks/grpo.py              # writes benchmarks/results/grpo.json, half an hour
python benchmarks/grpo.py --seeds 2 --out results.json

Every seed trains the first two stages of recipes/r1-zero.toml, and from its base each variant of the third. What is
told is the share of right answers to 199 questions held out, drawn at temperature 1. Given again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemoe.core.config import read_tables
from finemoe.studies.stages import run_stages
from finemoe.training.directory import read_metrics

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "r1-zero.toml"
VARIANTS: dict[str, list[str]] = {
    "as the recipe has it": [],
    "without a reference": ["method.beta=0"],
    "experts replayed": ["method.replay=rollout"],
    "other prompts for dead groups": ["method.dynamic_sampling=3"],
    "four steps on a rollout": ["method.steps_per_rollout=4"],
    "four steps, experts replayed": ["method.steps_per_rollout=4", "method.replay=rollout"],
    "rate 5 times as high": ["optimizer.learning_rate=5e-4"],
}
_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for 95 %, by how many values there are."""


def measure(folder: Path, seed: int, name: str, changes: Sequence[str]) -> dict[str, Any]:
    """One variant of one seed."""
    raw = read_tables(RECIPE)
    number = list(VARIANTS).index(name)
    raw["stage"][2]["name"] = f"zero-{number}"
    raw["stage"][2]["method"]["validation_prompts"] = 199
    run_stages(
        raw, out=folder / str(seed), overrides=[f"seed={seed}", *(f"stage.zero-{number}.{one}" for one in changes)],
        quiet=True,
    )  # fmt: skip
    records = read_metrics(folder / str(seed) / f"3-zero-{number}")
    held = [one for one in records if one["kind"] == "validation"]
    steps = [one for one in records if one["kind"] == "step"]
    reached = next((one for one in held if one["validation_reward_answer"] >= 0.8), None)
    return {
        "seed": seed,
        "before": held[0]["validation_reward_answer"],
        "after": held[-1]["validation_reward_answer"],
        "greedy": held[-1]["validation_greedy_reward_answer"],
        "length": [held[0]["validation_length"], held[-1]["validation_length"]],
        "steps_share": [held[0]["validation_reward_steps"], held[-1]["validation_reward_steps"]],
        "seconds": round(steps[-1]["seconds"], 1),
        "step_of_0.8": None if reached is None else reached["step"],
        "curve": [(one["step"], one["validation_reward_answer"], one["validation_length"]) for one in held],
        "time_rollout": round(statistics.mean(one["figures"]["time_rollout"] for one in steps), 3),
    }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds."""
    values = [one["after"] for one in found]
    mean = statistics.mean(values)
    half = _T[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"before": statistics.mean(one["before"] for one in found), "after": mean, "half": half, "all": values}


def main() -> None:
    """All variants of all seeds, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "grpo.json")
    asked = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in range(asked.seeds):
        for name, changes in VARIANTS.items():
            one = measure(asked.runs, seed, name, changes)
            found[name].append(one)
            print(f"seed {seed}, {name}: {one['before']:.2f} to {one['after']:.2f} in {one['seconds']} s", flush=True)
            told = {
                "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "cores": os.cpu_count(),
                "variants": {name: {**summary(each), "runs": each} for name, each in found.items() if each},
            }  # fmt: skip
            asked.out.write_text(json.dumps(told, indent=1) + "\n")
    for name, each in found.items():
        told = summary(each)
        half = "" if told["half"] is None else f" ± {told['half']:.3f}"
        print(f"{name:32} {told['before']:.3f} {told['after']:.3f}{half}")


if __name__ == "__main__":
    main()
