"""Runs of GRPO in a second or two: a tiny model that is rewarded for writing a letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finemoe.core.config import merge
from finemoe.runs.run import train
from runs.tiny_runs import recipe

LENGTH = 32


def base(corpus: Path, folder: Path, arm: str = "v3", **tables: Any) -> Path:
    """What runs begin with."""
    return train(recipe(corpus, arm, **{"training": {"steps": 2}, **tables}), out=folder / arm, quiet=True).directory


def rewards_file(folder: Path) -> Path:
    """A reward that most answers get some of: letters e in it."""
    path = folder / "letters.py"
    path.write_text(
        "def score(prompt, completion, record):\n"
        "    if 'crash' in record['prompt'] and len(completion) % 2:\n"
        "        raise ValueError('as it was told')\n"
        "    return sum(letter in 'aeiou' for letter in completion) / 4\n"
        "def odd(prompt, completion, record):\n"
        "    return sum(map(ord, completion)) % 7 / 7\n"
    )
    return path


def practising(base: Path, method: dict[str, Any] | None = None, **tables: Any) -> dict[str, Any]:
    """A recipe of 6 steps of 8 answers that begins with `base`."""
    reward = {"kind": "function", "path": f"{rewards_file(base.parent)}:score"}
    own = {
        "kind": "grpo", "template": "{prompt}", "group": 4, "answer_tokens": 6, "rewards": [reward],
        "validation_prompts": 2, "samples": 1, "keep_rollouts": 2,
    }  # fmt: skip
    return merge(
        {
            "start_from": str(base),
            "method": {**own, **(method or {})},
            "data": {
                "corpus": {"kind": "problems", "count": 40, "validation_count": 4},
                "sequence_length": LENGTH,
                "cache_dir": str(base.parent / "cache"),
            },
            "training": {"steps": 6, "tokens_per_step": 8 * LENGTH, "checkpoint_every": 2, "threads": 1},
            "optimizer": {"learning_rate": 0.003},
        },
        tables,
    )
