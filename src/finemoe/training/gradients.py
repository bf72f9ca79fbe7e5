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
        """`gradient_norm` is the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.max_norm)
        return {"gradient_norm": norm.item()}
