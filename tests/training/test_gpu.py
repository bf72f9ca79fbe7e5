"""The same step on a CUDA device. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer


@pytest.mark.gpu
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_loss_and_gradients_match_the_cpu(bf16, tolerance):
    tokens = torch.randint(0, 2048, (4, 128), generator=torch.Generator().manual_seed(0))
    results = {}
    for device in ("cpu", "cuda"):
        model = Transformer(expand(resolve({"preset": "tiny-moe"}, "test")))
        initialize(model, seed=0)
        model = model.to(device)
        batch = tokens.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16 and device == "cuda"):
            hidden = model(batch).hidden.flatten(0, 1)[:-1]
            targets = batch.flatten()[1:]
            weights = torch.ones_like(targets, dtype=torch.float32)
            loss = model.backend.cross_entropy_sum(hidden, model.head_weight, targets, weights) / len(targets)
        loss.backward()
        results[device] = loss.item(), model.embedding.weight.grad.cpu()
    assert results["cuda"][0] == pytest.approx(results["cpu"][0], rel=tolerance)
    difference = (results["cuda"][1] - results["cpu"][1]).norm() / results["cpu"][1].norm()
    assert difference < 10 * tolerance
