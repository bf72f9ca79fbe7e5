"""Gradients of every parameter equal transformers', mapped through the placements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity.foreign_models import gradients_as_file, make, ours, relative, take, tokens


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "llama-tied",
        "deepseek_v2",
        "deepseek_v3",
        "qwen2_moe",
        "olmoe",
        "qwen3",
        "glm4_moe",
        "glm4_moe-three-quarters",
    ],
)
def test_gradients(case: str, tmp_path: Path) -> None:
    theirs, ids = make(case), tokens()
    theirs.save_pretrained(tmp_path / "weights")
    model = ours(tmp_path / "weights")
    weight = torch.randn(*ids.shape, theirs.config.vocab_size, generator=torch.Generator().manual_seed(1))
    (theirs(ids).logits * weight).sum().backward()
    (model.logits(model(ids).hidden) * weight).sum().backward()

    buffers = dict(model.named_buffers())  # a selection bias has no gradient; its value stands in for it
    found = {name: buffers[name] for name in buffers}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    expected = gradients_as_file(theirs, tmp_path / "gradients")
    mapped = take(model, theirs.config.model_type, found)
    assert mapped.keys() == expected.keys()
    routed = [name for name in mapped if mapped[name].abs().max() > 0]
    assert len(routed) > 0.9 * len(mapped)
    for name, gradient in mapped.items():
        scale = max(float(expected[name].abs().max()), 1e-3)
        assert float((gradient - expected[name]).abs().max()) <= 1e-4 * scale, name
    everything = [torch.cat([table[name].flatten() for name in mapped]) for table in (mapped, expected)]
    assert relative(*everything) <= 1e-5
