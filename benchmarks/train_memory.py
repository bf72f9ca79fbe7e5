"""What `finemoe train` takes here with its default kernels, as `finemoe plan --device here` says and measured.

python benchmarks/train_memory.py            # writes benchmarks/results/train-memory.json, a few minutes
python benchmarks/train_memory.py --again    # what was measured, beside the planner as it is now

Each run is `finemoe train` of a recipe for a few steps in a process of its own, with validations and a checkpoint; its
height is the one that its summary records. Of the first, all that the plan does not count is taken to be what a
process takes at any rate (`runs.planning.measured.HERE.beside`); the others judge. Other work on the machine does not
change how much a process takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 6
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tiny", "tiny", ()),
    ("V1 of the ladder", "ladder/v1", ()),
    ("V2 of the ladder", "ladder/v2", ()),
    ("V3 of the ladder", "ladder/v3", ()),
    ("V3, recomputed", "ladder/v3", ("kernels.recompute=true",)),
    ("tiny, four times as wide", "tiny", ("model.hidden_size=256",)),
)
"""Name, recipe and what is set; the first fits."""
RESULT = Path(__file__).parent / "results" / "train-memory.json"


def measure(recipe: str, overrides: tuple[str, ...]) -> int:
    """[bytes] The height of the run, from its own summary."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        length = (f"training.steps={STEPS}", "training.evaluate_every=3", *overrides)
        settings = [word for one in length for word in ("--set", one)]
        words = [sys.executable, "-m", "finemoe", "train", _path(recipe), *settings, "--out", str(out)]
        subprocess.run(words, check=True, capture_output=True, text=True)
        return int(json.loads((out / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"])


def planned(recipe: str, overrides: tuple[str, ...], beside: int) -> int:
    """[bytes] As `finemoe plan RECIPE --gpus 1 --device here` says it."""
    from finemoe.parallel.config import Layout
    from finemoe.parallel.planner.memory import peak_memory
    from finemoe.runs.planning.asked import Options, question

    asked = question(_path(recipe), 1, overrides, Options(precision="fp32"))
    return peak_memory(asked.config.model, asked.setup(Layout(), here=True), beside=beside).total


def judged(peaks: list[int]) -> dict[str, Any]:
    """Beside, from the first run, and how the others come out."""
    beside = peaks[0] - planned(*RUNS[0][1:], 0)
    rows: list[dict[str, Any]] = []
    for number, ((name, recipe, overrides), peak) in enumerate(zip(RUNS, peaks, strict=True)):
        said = planned(recipe, overrides, beside)
        part = "judged" if number else "fitted"
        rows.append({"name": name, "part": part, "peak": peak, "planned": said, "error": said / peak - 1})
    return {"beside": beside, "worst": max(abs(row["error"]) for row in rows[1:]), "runs": rows}


def _path(recipe: str) -> str:
    return str(Path(__file__).parents[1] / "recipes" / f"{recipe}.toml")


def main() -> None:
    """Measure every run, or take what was measured."""
    from finemoe.core.environment import environment

    before: dict[str, Any] = {}
    if sys.argv[1:] == ["--again"]:
        before = json.loads(RESULT.read_text(encoding="utf-8"))
        measured = {row["name"]: row["peak"] for row in before["runs"]}
        peaks = [measured[name] for name, *_ in RUNS]
    else:
        peaks = []
        for name, recipe, overrides in RUNS:
            peaks.append(measure(recipe, overrides))
            print(name, peaks[-1], file=sys.stderr, flush=True)
    facts = {"kind": "train-memory", "steps": STEPS, "load_average": os.getloadavg(), "machine": environment()}
    found = {**facts, **before, **judged(peaks)}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for row in found["runs"]:
        sizes = f"planned {row['planned'] / 2**20:6.0f} MiB, measured {row['peak'] / 2**20:6.0f}"
        print(f"{row['name']:26} {row['part']}  {sizes}  {100 * row['error']:+.1f} %")


if __name__ == "__main__":
    main()
