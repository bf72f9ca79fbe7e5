"""Gradient transforms: the slot between backward and update. Each changes gradients in place and reports figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class GradientTransform(Protocol):
    """In order; the last one is the clip."""

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Change `.grad` of the parameters in place; figures for the report."""
        ...


@dataclass(frozen=True)
class Clip:
    """Scale all gradients down together when their joint norm is above `max_norm`."""

    max_norm: float

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """`gradient_norm` is the norm before clipping. Gradients below the bound are read once and not written."""
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm <= self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.max_norm, norm)
        return {"gradient_norm": norm.item()}
