"""Which tensors a model has, without the model."""

from __future__ import annotations

import torch

from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the model's state_dict, without its memory.

    Raises:
        CheckpointError: sizes beyond what a tensor can have.
    """
    return {name: tuple(tensor.shape) for name, tensor in _without_memory(config).state_dict().items()}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same of its parameters alone, each once; without buffers such as selection biases.

    Raises:
        CheckpointError: sizes beyond what a tensor can have.
    """
    return {name: tuple(parameter.shape) for name, parameter in _without_memory(config).named_parameters()}


def _without_memory(config: ModelConfig) -> Transformer:
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # torch has no error of its own for it
        raise CheckpointError(f"no model can have the sizes of the configuration: {error}") from error
