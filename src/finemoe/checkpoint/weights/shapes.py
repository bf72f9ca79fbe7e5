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
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # torch has no error of its own for it
        raise CheckpointError(f"no model can have the sizes of the configuration: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
