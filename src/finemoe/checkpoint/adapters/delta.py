"""Tuned experts as a delta: the chosen experts' matrices, and what names the model that they belong to.

A folder of `delta.safetensors`, where expert 3 of a stack is under the stack's name and `.3`, and `delta.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from finemoe.checkpoint.adapters.tuned import Base, Tuned
from finemoe.core.config import Config
from finemoe.core.errors import CheckpointError

DELTA, DELTA_WEIGHTS = "delta.json", "delta.safetensors"
_LAYER = re.compile(r"blocks\.(\d+)\.")


class DeltaConfig(Config):
    """delta.json: which experts, and of what."""

    kind: Literal["expert_delta"] = "expert_delta"
    schema_version: Literal[1] = 1
    base: Base
    """The model that was tuned."""
    experts: dict[NonNegativeInt, tuple[NonNegativeInt, ...]]
    """By layer."""


def to_delta(tuned: Tuned) -> tuple[dict[int, tuple[int, ...]], dict[str, Tensor]]:
    """The experts of delta.json, and its tensors by name.

    Args:
        tuned: of a run with trainable.kind "experts".
    """
    experts = {int(layer): tuple(chosen) for layer, chosen in tuned.values["experts"].items()}
    tensors = {
        f"{name}.{expert}": rows[at]
        for name, rows in sorted(tuned.tensors.items())
        for at, expert in enumerate(experts[_layer_of(name)])
    }
    return experts, tensors


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match is not None else -1


def apply_delta(delta: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The stacks that change, whole and in float32, as the tuned model has them bit for bit.

    Args:
        delta: by stack and expert.
        weights: of the base, by the names of `Transformer.state_dict()`.
        where: the delta, as messages name it.

    Raises:
        CheckpointError: a tensor fits no expert of the base.
    """
    changed: dict[str, Tensor] = {}
    for key, tensor in delta.items():
        name, _, expert = key.rpartition(".")
        stack = weights.get(name)
        if stack is None or not expert.isdecimal() or int(expert) >= len(stack) or stack.shape[1:] != tensor.shape:
            raise CheckpointError(f"{where}: {key} fits no expert of the base; it is a delta of another model")
        if name not in changed:
            changed[name] = stack.to(torch.float32, copy=True)
        changed[name][int(expert)] = tensor
    return changed
