"""Validation against a loop anyone would write: whole logits, in eval mode, each target by its weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from finemoe.data.batch import TokenBatch
from finemoe.model.transformer import Transformer
from finemoe.training.validation import validate
from oracles.models import VOCAB, build, moe_table, small_config

LENGTH = 12
ROUTED = 1  # the layer of `small_config` that has experts


def batches() -> list[TokenBatch]:
    """Two of unequal size; two documents a row, and weights of 0 to 3, whose mean is not 1."""
    made = []
    for rows in (3, 2):
        tokens = torch.randint(VOCAB, (rows, LENGTH + 1))
        place = torch.arange(LENGTH).expand(rows, LENGTH)
        weights = (place % 4).float()
        made.append(TokenBatch(tokens[:, :-1], tokens[:, 1:], weights, place % 7, place // 7))
    return made


def dropping() -> Transformer:
    """A model whose experts take half of an even share while it trains."""
    return build(small_config(feed_forward=moe_table(capacity_factor=0.5), init_std=0.2))


def recount(model: Transformer, isolate: bool) -> tuple[float, torch.Tensor]:
    """Loss, and the load of the routed layer."""
    torch.manual_seed(0)
    model.eval()
    total, weight, load = 0.0, 0.0, torch.zeros(6, dtype=torch.int64)
    for batch in batches():
        output = model(batch.tokens, positions=batch.positions, documents=batch.documents if isolate else None)
        logits = model.logits(output.hidden).flatten(0, 1)
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none")
        total += (losses * batch.weights.flatten()).sum().item()
        weight += batch.weights.sum().item()
        load += output.routing[ROUTED].load
    return total / weight, load


@pytest.mark.parametrize("isolate", [True, False], ids=["isolate", "concatenate"])
def test_validation_is_the_recount_in_eval_mode(isolate: bool) -> None:
    model = dropping()
    expected, load = recount(model, isolate)
    torch.manual_seed(0)
    found = validate(model.train(), batches(), isolate_documents=isolate, bytes_per_token=3.0)
    assert found.loss == found.headline == pytest.approx(expected, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 3)
    assert found.load[ROUTED].tolist() == load.tolist()


def test_the_mode_would_have_mattered() -> None:
    model, batch = dropping().train(), batches()[0]
    output = model(batch.tokens, positions=batch.positions)
    assert output.routing[ROUTED].dropped > 0
    assert not torch.allclose(output.hidden, model.eval()(batch.tokens, positions=batch.positions).hidden)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode_and_without_gradients(training: bool) -> None:
    model = dropping().train(training)
    validate(model, batches(), isolate_documents=False, bytes_per_token=1.0)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
