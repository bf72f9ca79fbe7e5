"""Balanced hash tables of a run are dealt by how often its own training text has each token."""

from __future__ import annotations

from pathlib import Path

import torch

from finemoe.checkpoint.run_state.state import load_model
from finemoe.data import prepare
from finemoe.runs.config import read_config
from finemoe.runs.run import train
from runs.tiny_runs import recipe, steps


def test_a_balanced_table_evens_out_the_text_of_the_run(corpus: Path, tmp_path: Path) -> None:
    tables = {"model": {"feed_forward": {"router": {"kind": "hash_layer", "table": "balanced"}}}}
    run = train(recipe(corpus, "hash", **tables), out=tmp_path / "run", quiet=True)
    data = prepare(read_config(run.directory / "config.json").data)
    counts = torch.from_numpy(data.token_frequencies())
    for layer in load_model(run.directory).moe_layers.values():
        expert_of_token = layer.router.expert_of_token[:, 0]
        load = torch.zeros(4, dtype=torch.int64).scatter_add_(0, expert_of_token, counts)
        assert load.sum() == data.train.num_tokens
        # The greedy rule: the last token that the fullest expert got went to the emptiest one then.
        assert load.max() - load.min() <= counts.max()
    assert all(min(record["load"]["0"]) > 0 for record in steps(run.directory))
