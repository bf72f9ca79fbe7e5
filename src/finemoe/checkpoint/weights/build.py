"""A model filled from parts that come one at a time, in whatever element type is wanted; or its tensors, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from finemoe.checkpoint.storage.memory import empty_tensors, wanted_type
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.checkpoint.weights.small import of_tensor, small_shape
from finemoe.core.errors import CheckpointError
from finemoe.model.config import Kernels, ModelConfig
from finemoe.model.quantised.blocks import Format, dequantise, is_quantised
from finemoe.model.quantised.making import quantise
from finemoe.model.transformer import Transformer

Part = tuple[str, tuple[int | slice, ...], Tensor]
"""Name of a tensor of ours, where in it, and what goes there."""


def build(
    config: ModelConfig,
    kernels: Kernels | None,
    stored: Mapping[str, torch.dtype],
    parts: Iterable[Part],
    dtype: torch.dtype | None,
    small: Mapping[str, Format] | None = None,
) -> Transformer:
    """A model filled part by part, so that nothing is held twice.

    Args:
        config: the model.
        kernels: how to compute.
        stored: element type of each tensor as it is stored, of bytes what they stand for unless they stay; must name
            every tensor of the model.
        parts: together they fill every tensor.
        dtype: as in `load_model`; of what is not small.
        small: the format of each tensor that becomes, or already is, blocks of few bits. Such a model learns nothing. A
            tensor that is stored as bytes comes whole and is taken as it comes: it may lie in a mapped file.

    Raises:
        CheckpointError: `stored` names other tensors than the model has, or a number is none that blocks can hold.
    """
    shapes, small = fitting_shapes(config, stored), small or {}
    with torch.device("meta"):
        model = Transformer(config, kernels)
        for name, kind in small.items():
            _exchange(model, name, torch.empty(small_shape(name, shapes[name], kind), dtype=torch.uint8))
    model.requires_grad_(not small)
    wanted = {name: (shape, wanted_type(name, stored[name], dtype)) for name, shape in shapes.items()}
    wanted |= {name: (small_shape(name, shapes[name], kind), torch.uint8) for name, kind in small.items()}
    as_it_is = {name for name in small if stored[name] is torch.uint8}
    state = empty_tensors({name: what for name, what in wanted.items() if name not in as_it_is})
    for name, index, tensor in parts:
        if name in as_it_is:
            if tensor.shape != wanted[name][0]:
                raise CheckpointError(f"tensor {name!r} is {list(tensor.shape)} instead of {list(wanted[name][0])}")
            state[name] = tensor
        else:
            with of_tensor(name):
                state[name][index].copy_(_as_wanted(tensor, small.get(name), shapes[name][-1]))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _as_wanted(tensor: Tensor, kind: Format | None, columns: int) -> Tensor:
    """A part as numbers, or as blocks of `kind`."""
    if is_quantised(tensor):
        if kind is not None and tensor.shape[-1] == kind.bytes:
            return tensor
        tensor = dequantise(tensor, columns)
    return tensor if kind is None else quantise(tensor, kind)


def _exchange(model: nn.Module, name: str, tensor: Tensor) -> None:
    home, _, last = name.rpartition(".")
    model.get_submodule(home).register_parameter(last, nn.Parameter(tensor, requires_grad=False))


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
        with of_tensor(name):
            target.copy_(_as_wanted(tensor, None, shapes[name][-1]))
        left[name] -= target.numel()
        if not left[name]:
            yield name, begun.pop(name)
