"""Validation computes with the model's own kernels."""

from __future__ import annotations

import pytest
import torch

from finemoe.data.batch import TokenBatch
from finemoe.training.validation import validate
from oracles.models import VOCAB, build, small_config


def test_products_torch_is_honoured_by_the_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(VOCAB, (2, 8))
    positions = torch.arange(8).expand_as(ids)
    batch = TokenBatch(ids, ids.roll(-1, 1), torch.ones(2, 8), positions, torch.zeros_like(ids))
    losses = {}
    for products in ("native", "torch"):
        model = build(small_config(), products=products)
        if products == "torch":
            monkeypatch.setattr("finemoe.model.backends.native_cross_entropy_sum", None)
        losses[products] = validate(model, [batch], isolate_documents=False, bytes_per_token=1.0).loss
    assert losses["torch"] == pytest.approx(losses["native"], rel=1e-5)
