"""Runs that adapt a tiny model, in a fraction of a second: what they begin with, what they read, their recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.selection import (
    ExpertSelection,
    LayerSelection,
    router_fingerprint,
    shape_of,
    trainable,
    write_selection,
)
from finemoe.core.config import merge
from finemoe.runs.run import train
from runs.tiny_runs import recipe

LENGTH = 48
WORDS = ("ant", "bee", "cat", "dog", "ear", "fox", "gnu", "hen", "ink", "jay")


def write_pairs(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Questions with a better and a worse answer, which do for conversations too."""
    drawn = random.Random(seed)
    records = []
    for number in range(count):
        asked = " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(1, 3)))
        records.append({"prompt": f"{number} {asked}?", "chosen": f"{asked}.", "rejected": drawn.choice(WORDS)})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def begin(corpus: Path, folder: Path, arm: str, **tables: Any) -> Path:
    """A run of two steps, for others to begin with; `tables` are laid on its recipe."""
    return train(recipe(corpus, arm, **{"training": {"steps": 2}, **tables}), out=folder / arm, quiet=True).directory


def adapting(base: Path, pairs: Path, method: dict[str, Any], **tables: Any) -> dict[str, Any]:
    """A recipe of 6 steps of 4 sequences that begins with `base`."""
    return merge(
        {
            "start_from": str(base),
            "method": method,
            "data": {
                "corpus": {"kind": "files", "paths": [str(pairs)]},
                "sequence_length": LENGTH,
                "validation_share": 0.2,
                "cache_dir": str(pairs.parent / "cache"),
            },
            "training": {"steps": 6, "tokens_per_step": 4 * LENGTH, "checkpoint_every": 2, "threads": 1},
            "optimizer": {"learning_rate": 0.01},
        },
        tables,
    )


def select(base: Path, path: Path, experts: dict[int, tuple[int, ...]]) -> Path:
    """A selection of experts for `base`, as an analysis would write it."""
    model = load_model(base)
    count, share = trainable(model.config, experts)
    layers = tuple(
        LayerSelection(layer=layer, experts=chosen, scores=(0.1,) * len(chosen)) for layer, chosen in experts.items()
    )
    selection = ExpertSelection(
        source=str(base), router_sha256=router_fingerprint(model), model=shape_of(model.config), score="gate", p=0.2,
        samples=1, tokens=1, trainable_parameters=count, trainable_share=share, layers=layers,
    )  # fmt: skip
    write_selection(path, selection)
    return path


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run holds now."""
    return dict(load_model(directory).state_dict())


def run(base: Path, out: Path, method: str = "sft", own: dict[str, Any] | None = None, **tables: Any) -> Path:
    raw = adapting(base, base.parent / "pairs.jsonl", {"kind": method, **(own or {})}, **tables)
    return train(raw, out=out, quiet=True).directory
