"""Keep a finished comparison or paper study in benchmarks/results: numbers and figures, not the text of samples.

python benchmarks/record.py runs/stdlib stdlib
python benchmarks/record.py runs/paper-tiny paper-tiny
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PICTURES = ("loss_tokens.png", "paper.png", "differences.png", "masked.png")
"""Shown in documents; the others are kept as SVG only."""


def record(comparison: Path, name: str) -> Path:
    """Copy results.json without samples, results.csv and the figures to `results/NAME`."""
    results = json.loads((comparison / "results.json").read_text(encoding="utf-8"))
    for arm in results["arms"].values():
        if "sample" in arm:
            arm["sample"] = None
    target = RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for table in ("results.csv", "summary.md"):
        if (comparison / table).exists():
            shutil.copy(comparison / table, target)
    for figure in sorted((comparison / "figures").iterdir()):
        if figure.suffix == ".svg" or figure.name in PICTURES:
            shutil.copy(figure, target)
    return target


if __name__ == "__main__":
    print(record(Path(sys.argv[1]), sys.argv[2]))
