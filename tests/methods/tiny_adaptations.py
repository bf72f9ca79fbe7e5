"""A tiny recipe for every method on conversations with every choice of what may move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finemoe.core.config import merge
from finemoe.runs.run import train
from methods.grpo.tiny_policy import rewards_file
from methods.tiny_talks import adapting, begin, select, write_pairs
from runs.tiny_runs import recipe

ADAPT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sft": lambda folder: {"loss": "conversation"},
    "dpo": lambda folder: {"nll": 0.1},
    "reward": lambda folder: {},
    "grpo": lambda folder: {
        "group": 4,
        "answer_tokens": 4,
        "validation_prompts": 2,
        "rewards": [{"kind": "function", "path": f"{folder / 'letters.py'}:odd"}],
    },
    "distill": lambda folder: {"teacher": str(folder / "teacher"), "top_k": 8},
}
MOVE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "everything": lambda folder: {"freeze": ["routers", "embeddings"]},
    "names": lambda folder: {"train": ["attention", "blocks.1.*"]},
    "experts": lambda folder: {"selection": str(folder / "selection.json")},
    "lora": lambda folder: {"rank": 3},
    "child": lambda folder: {"mode": "D", "granularity": "row"},
}


def begin_all(corpus: Path, folder: Path, **tables: Any) -> Path:
    """A V3 in miniature, and beside it what it is to learn, who teaches it, and the experts that it may move."""
    run = begin(corpus, folder, "v3", **tables)
    write_pairs(folder / "pairs.jsonl")
    rewards_file(folder)
    select(run, folder / "selection.json", {1: (6, 2)})
    train(recipe(corpus, "dense", seed=7, training={"steps": 2}), out=folder / "teacher", quiet=True)
    return run


def of_kinds(base: Path, method: str, moving: str, **tables: Any) -> dict[str, Any]:
    """The recipe, on what `begin_all` made; `tables` are laid on top."""
    folder = base.parent
    trainable = {"kind": moving, **MOVE[moving](folder)}
    own = {"kind": method, **ADAPT[method](folder)}
    return merge(adapting(base, folder / "pairs.jsonl", own, trainable=trainable), tables)
