"""Small models, and runs that tuned them a little: what adapters are written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.selection import ExpertSelection, LayerSelection, shape_of, write_selection
from finemoe.model.config import ModelConfig
from finemoe.runs.run import train
from runs.tiny_runs import data_table, recipe, write_corpus

TOKENS = torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(3))


def base_of(folder: Path, arm: str) -> Path:
    """A model of one of the shapes of `tiny_runs`, trained for two steps on `folder/corpus`."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    if not (folder / arm).exists():
        train(recipe(corpus, arm, training={"steps": 2}), out=folder / arm, quiet=True)
    return folder / arm


def tune(folder: Path, arm: str, name: str, **trainable: Any) -> Path:
    """A run that tunes the base of `arm` so, in few steps that are long enough to see."""
    data = data_table(folder / "corpus")
    data.pop("vocab_size")
    table = {
        "start_from": str(base_of(folder, arm)),
        "trainable": trainable,
        "data": data,
        "training": {"steps": 4, "tokens_per_step": 64, "threads": 1},
        "optimizer": {"learning_rate": 0.05, "weight_decay": 0.1},
        "schedule": {"kind": "constant"},
    }
    return train(table, out=folder / name, quiet=True).directory


def select(path: Path, config: ModelConfig) -> str:
    """A selection of three experts of every MoE layer, the first of them the most relevant."""
    chosen = tuple(LayerSelection(layer=n, experts=(5, 0, 2), scores=(0.5, 0.3, 0.1)) for n in config.moe_layers)
    made = ExpertSelection(
        source="base", router_sha256="0" * 64, model=shape_of(config), score="gate", p=0.5, samples=1, tokens=1,
        trainable_parameters=1, trainable_share=0.5, layers=chosen,
    )  # fmt: skip
    write_selection(path, made)
    return str(path)


@torch.inference_mode()
def logits(path: Path) -> Tensor:
    """Of the model at `path`, for TOKENS."""
    model = load_model(path)
    return model.logits(model(TOKENS).hidden)
