"""Conversations packed in one row come to what they come to alone: states, loads, balance terms, what lies ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finemoe.model.config import ModelConfig
from oracles.models import VOCAB, build, moe_table, small_config, v3_config
from oracles.packed import alone, packed

NEAR: dict[str, float] = {"rtol": 1e-6, "atol": 1e-6}
"""Scores are computed in float32, whatever the rest is."""
LENGTHS = (5, 9, 3, 12, 4)
BALANCE = {"expert": 0.1, "device": 0.2, "communication": 0.3, "z": 0.05, "num_devices": 3}
MODELS: dict[str, ModelConfig] = {
    "softmax": small_config(feed_forward=moe_table(balance=BALANCE)),
    "v3 with two modules ahead": v3_config(),
}


def outputs(model: Any, batch: Any) -> Any:
    rows, ahead = batch.rows, len(model.mtp) > 0
    return model(rows.tokens, positions=rows.positions, documents=rows.documents, by_document=True, mtp=ahead)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("experts", ["native", "sorted_slices"])
def test_packed_is_alone(name: str, experts: str) -> None:
    model = build(MODELS[name], experts=experts).double().train()
    batch = packed(LENGTHS, VOCAB)
    whole, parts = outputs(model, batch), [outputs(model, one) for one in alone(batch)]
    torch.testing.assert_close(whole.hidden, torch.cat([one.hidden for one in parts], dim=1), **NEAR)
    for depth, states in enumerate(whole.mtp_hidden):
        expected = torch.cat([one.mtp_hidden[depth] for one in parts], dim=1)
        torch.testing.assert_close(states, expected, **NEAR)
    assert whole.routing.keys() == parts[0].routing.keys()
    for layer, record in whole.routing.items():
        assert torch.equal(record.load, sum(one.routing[layer].load for one in parts))
        assert record.balance.keys() == parts[0].routing[layer].balance.keys() != set()
        for term, value in record.balance.items():
            expected = torch.stack([one.routing[layer].balance[term] for one in parts]).sum()
            torch.testing.assert_close(value, expected, **NEAR)


def test_padding_would_have_been_counted() -> None:
    """What the packed row avoids: the same conversations as rows with padding send more to the experts."""
    model = build(MODELS["softmax"]).train()
    batch = packed(LENGTHS, VOCAB)
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    whole = outputs(model, batch).routing[1].load.sum()
    assert whole == 2 * sum(LENGTHS) < model(padded).routing[1].load.sum()


def test_rows_and_documents_are_not_confused() -> None:
    model, batch = build(MODELS["softmax"]), packed(LENGTHS, VOCAB)
    with pytest.raises(ValueError, match="by_document needs documents, in a single row"):
        model(batch.rows.tokens, by_document=True)
    tokens, documents = (one.expand(2, -1) for one in (batch.rows.tokens, batch.rows.documents))
    with pytest.raises(ValueError, match="in a single row"):
        model(tokens, documents=documents, by_document=True)
