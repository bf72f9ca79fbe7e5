"""A model filled from parts that come one at a time, in whatever element type is wanted; or its tensors, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

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
    shapes = fitting_shapes(config, stored)
    with torch.device("meta"):
        model = Transformer(config, kernels)
    state = empty_tensors({name: (shape, wanted_type(name, stored[name], dtype)) for name, shape in shapes.items()})
    for name, index, tensor in parts:
        state[name][index].copy_(tensor)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def fitting_shapes(config: ModelConfig, stored: Mapping[str, torch.dtype]) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the model.

    Raises:
        CheckpointError: sizes that no machine holds, or `stored` names other tensors.
    """
    shapes = model_shapes(config)
    if shapes.keys() != stored.keys():
        odd = sorted(shapes.keys() ^ stored.keys())[:5]
        raise CheckpointError(f"the weights do not fit the configuration: {', '.join(odd)}")
    return shapes


def one_by_one(
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, torch.dtype],
    parts: Iterable[Part],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors by name, each as soon as its last part has come: no more are held than have begun.

    Args:
        shapes: of every tensor of the model.
        stored, parts, dtype: as of `build`; no two parts overlap.
    """
    begun: dict[str, Tensor] = {}
    left = {name: math.prod(shape) for name, shape in shapes.items()}
    for name, index, tensor in parts:
        if name not in begun:
            begun[name] = torch.empty(shapes[name], dtype=wanted_type(name, stored[name], dtype))
        target = begun[name][index]
        target.copy_(tensor)
        left[name] -= target.numel()
        if not left[name]:
            yield name, begun.pop(name)
