"""A tiny dense model with large weights, mixtures of it, and a run directory that holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.methods.upcycling import UpcyclingConfig, upcycle_weights, upcycled_config
from finemoe.model.config import ModelConfig, expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer

HIDDEN, WIDTH, VOCAB = 32, 48, 300
TEXTS = ["def main(self):\n    return self.x + 1\n", "class A:\n    pass\n"] * 30


def dense_config(**changes: Any) -> ModelConfig:
    table = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": 3,
        "attention": {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "feed_forward": {"kind": "dense", "ffn_hidden_size": WIDTH},
        "init_std": 0.2,
        **changes,
    }
    return expand(resolve(table, "the test"))


def drawn(config: ModelConfig, seed: int = 1) -> Transformer:
    model = Transformer(config).eval()
    initialize(model, seed=seed)
    return model


def upcycled(dense: Transformer, config: UpcyclingConfig) -> Transformer:
    model = Transformer(upcycled_config(dense.config, config)).eval()
    model.load_state_dict(dict(upcycle_weights(dense.state_dict(), dense.config, config)))
    return model


def run_of(folder: Path, model: Transformer) -> Path:
    """A run directory with `model` as its one checkpoint."""
    folder.mkdir()
    text = json.dumps({"model": model.config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (folder / "config.json").write_text(text)
    save(folder / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
    Tokenizer.train(TEXTS, vocab_size=VOCAB).save(folder / "tokenizer.json")
    return folder
