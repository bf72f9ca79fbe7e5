"""AdamW with two groups: matrices decay, vectors (norms) do not."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from finemoe.core.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW as in all the papers; the learning rate is the peak of the schedule."""

    learning_rate: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    max_gradient_norm: PositiveFloat = 1.0


def build_optimizer(config: OptimizerConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over `parameters` by name, fused: one pass over the weights instead of a dozen."""
    decay = [p for p in parameters.values() if p.ndim >= 2]
    rest = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by `parameter name/state name`, for a checkpoint."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Every key is used, or it is an error."""
    left = dict(tensors)
    for name, parameter in parameters.items():
        keys = [key for key in left if key.rpartition("/")[0] == name]
        optimizer.state[parameter] = {
            key.rpartition("/")[2]: left.pop(key).to(parameter.device, copy=True) for key in keys
        }
    if left:
        raise ValueError(f"optimizer state of unknown parameters: {sorted(left)[:3]}")
