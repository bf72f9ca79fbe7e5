"""Record the golden trajectories again: `python tests/golden/record.py`. A deliberate act: review the difference.

Losses and gradient norms of 12 steps of seven tiny models on a generated text. They change when something between a
recipe and the optimizer changes what it computes, which no test against an oracle of one part would show.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).with_name("trajectories.json")
Trajectory = dict[str, list[float]]


def trajectory(corpus: Path, arm: str, out: Path) -> Trajectory:
    """Train `arm` into `out`: loss and gradient norm by step, and the validation loss at the end."""
    from finemoe.runs.run import train
    from runs.tiny_runs import recipe, steps

    raw = recipe(corpus, arm, seed=3, training={"steps": 12, "checkpoint_every": 100})
    run = train(raw, out=out, quiet=True)
    taken = steps(run.directory)
    return {
        "loss": [record["loss"] for record in taken],
        "gradient_norm": [record["gradient_norm"] for record in taken],
        "validation_loss": [run.summary["final_validation_loss"]],
    }


def main() -> None:
    """Write trajectories.json."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from runs.tiny_runs import FEED_FORWARDS, LADDER, write_corpus

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        recorded = {arm: trajectory(corpus, arm, Path(folder) / arm) for arm in (*FEED_FORWARDS, *LADDER)}
    rounded = {
        arm: {name: [float(f"{value:.7g}") for value in values] for name, values in figures.items()}
        for arm, figures in recorded.items()
    }
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
    print(f"recorded {', '.join(rounded)} in {GOLDEN}")


if __name__ == "__main__":
    main()
