"""A model filled from parts that come one at a time, in whatever element type is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from finemoe.checkpoint.storage.memory import empty_tensors, wanted_type
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.errors import CheckpointError
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.transformer import Transformer

Part = tuple[str, tuple[int | slice, ...], Tensor]
"""Name of a tensor of ours, where in it, and what goes there."""


def build(
    config: ModelConfig,
    kernels: Kernels | None,
    stored: Mapping[str, torch.dtype],
    parts: Iterable[Part],
    dtype: torch.dtype | None,
) -> Transformer:
    """A model filled part by part, so that nothing is held twice.

    Args:
        config: the model.
        kernels: how to compute.
        stored: element type of each tensor as it is stored; must name every tensor of the model.
        parts: together they fill every tensor.
        dtype: as in `load_model`.

    Raises:
        CheckpointError: `stored` names other tensors than the model has.
    """
    model_shapes(config)  # refuses sizes that no machine holds
    with torch.device("meta"):
        model = Transformer(config, kernels)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if shapes.keys() != stored.keys():
        odd = sorted(shapes.keys() ^ stored.keys())[:5]
        raise CheckpointError(f"the weights do not fit the configuration: {', '.join(odd)}")
    state = empty_tensors({name: (shape, wanted_type(name, stored[name], dtype)) for name, shape in shapes.items()})
    for name, index, tensor in parts:
        state[name][index].copy_(tensor)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
