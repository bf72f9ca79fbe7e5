"""A teacher, a student of its tokenizer, and conversations for both: small enough for a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from finemoe.core.config import merge
from finemoe.runs.run import train
from runs.tiny_runs import recipe, write_corpus

LENGTH = 48
SHORT: dict[str, Any] = {"max_new_tokens": 12, "quiet": True}
"""How answers are drawn."""


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_conversations(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Sums, asked and answered."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = rng.randrange(50), rng.randrange(50)
        messages = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": f"it is {a + b}"}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_models(folder: Path) -> dict[str, Path]:
    """`corpus`, a mixture as `teacher`, a narrower dense `student`, and `chats`; one tokenizer."""
    corpus = write_corpus(folder / "corpus")
    made = {"corpus": corpus, "teacher": folder / "teacher", "student": folder / "student"}
    train(recipe(corpus, training={"steps": 40}), out=made["teacher"], quiet=True)
    tokenizer = {"data": {"tokenizer": str(made["teacher"])}, "training": {"steps": 1}, "seed": 5}
    small = merge(tokenizer, {"model": {"hidden_size": 8}})
    train(_without_size(recipe(corpus, "dense", **small)), out=made["student"], quiet=True)
    return {**made, "chats": write_conversations(folder / "chats.jsonl")}


def _without_size(raw: dict[str, Any]) -> dict[str, Any]:
    raw["data"].pop("vocab_size")
    return raw


def distilling(models: dict[str, Path], start: str = "student", **tables: Any) -> dict[str, Any]:
    """A recipe of 4 steps of 4 bins of conversations; `tables` are laid on top."""
    corpus = {"kind": "files", "paths": [str(models["chats"])]}
    return merge(
        {
            "start_from": str(models[start]),
            "data": {
                "corpus": corpus,
                "validation_share": 0.3,
                "sequence_length": LENGTH,
                "cache_dir": str(models["corpus"] / "cache"),
            },
            "training": {"steps": 4, "tokens_per_step": 4 * LENGTH, "checkpoint_every": 2, "threads": 1},
            "optimizer": {"learning_rate": 0.01},
            "method": {"kind": "distill", "teacher": str(models["teacher"])},
        },
        tables,
    )


def of_documents(models: dict[str, Path], **tables: Any) -> dict[str, Any]:
    """The same on documents, of 16 tokens a sequence."""
    corpus = models["corpus"]
    paths = {"paths": [str(corpus / "train")], "validation_paths": [str(corpus / "validation.txt")]}
    return distilling(
        models,
        **merge(
            {
                "data": {"corpus": paths, "sequence_length": 16},
                "training": {"tokens_per_step": 64},
                "method": {"data_kind": "documents"},
            },
            tables,
        ),
    )
