"""Llama 3.1's rotary scaling is written as factors: whatever its settings, they come back as the same frequencies."""

from __future__ import annotations

import pytest
import torch

from checkpoint.gguf.gguf_files import DENSE, MODELS, QUERIES, config_of, recipe
from finemoe.checkpoint.gguf.architectures import ARCHITECTURES
from finemoe.checkpoint.gguf.config import Facts, model_config
from finemoe.checkpoint.gguf.keys import stored_tensors
from finemoe.checkpoint.gguf.metadata import describe
from finemoe.checkpoint.weights.agreement import differences
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig


def read_back(config: ModelConfig, factors: torch.Tensor | None) -> ModelConfig:
    found = describe(config)
    names = {stored.name for stored in stored_tensors(config)}
    values = {"general.architecture": found.architecture, **found.values}
    return model_config(values, Facts(names, config.vocab_size, factors), "file")


def scaled(dim: int, theta: float, bias: bool = False, **scaling: float) -> ModelConfig:
    rope = {"theta": theta, "scaling": {"kind": "llama3", **scaling}}
    return config_of(recipe({**QUERIES, "head_dim": dim, "qkv_bias": bias, "rope": rope}, DENSE))


@pytest.mark.parametrize("dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1.0, 2.0), (2.0, 4.0), (1.5, 4.0), (0.3, 0.31)])
def test_any_scaling_comes_back_as_the_same_frequencies(dim: int, theta: float, low: float, high: float) -> None:
    """Where few or no components are blended, several settings are the same rotation, and one of them is read."""
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    for original in (512, 1000, 8192):
        for factor in (4.0, 32.0):
            settings = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            config = scaled(dim, theta, **settings, original_max_positions=original)
            back = read_back(config, describe(config).rope_factors)
            ours, theirs = (c.blocks[0].attention.rope.scaling for c in (config, back))
            found = plain if theirs is None else theirs.inverse_frequencies(plain, theta)
            torch.testing.assert_close(found, ours.inverse_frequencies(plain, theta), rtol=2e-5, atol=0)


def test_other_frequencies_are_another_model() -> None:
    settings = {"factor": 8.0, "original_max_positions": 512}
    one, other = (scaled(64, 1e4, **settings, high_freq_factor=high) for high in (4.0, 4.5))
    assert differences(one, one) == []
    assert any("rope.scaling.frequencies" in text for text in differences(one, other))
    same = scaled(64, 1e4, factor=8.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_positions=1024)
    assert differences(one, same) == []


def test_a_bias_beside_the_scaling_is_written_as_the_architecture_that_has_both() -> None:
    assert describe(scaled(16, 5e5, bias=True, factor=8.0, original_max_positions=8192)).architecture == "llama"
    assert describe(config_of(recipe({**QUERIES, "qkv_bias": True}, DENSE))).architecture == "qwen2"


@pytest.mark.parametrize("name", [name for name, found in ARCHITECTURES.items() if not found.frequencies])
def test_factors_are_refused_where_they_mean_nothing(name: str) -> None:
    """Never left out in silence: the file would be opened as another model."""
    for raw in MODELS.values():
        config = config_of(raw)
        if describe(config).architecture == name:
            with pytest.raises(CheckpointError, match=r"rope_freqs\.weight|rope\.scaling"):
                read_back(config, torch.linspace(1.0, 8.0, 8))
            return
    pytest.fail(f"no small model is written as {name}")
