"""Muon: momentum whose matrices are made orthogonal before they are applied.

Jordan et al., "Muon: an optimizer for hidden layers", 2024; scaled to AdamW's size as in Liu et al. (2502.16982),
section 2.2. torch's own takes two-dimensional parameters only, and experts are stacked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients that bring singular values near 1 in few steps, without ever meeting it exactly."""


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: singular values land between 0.7 and 1.2.

    Args:
        matrices: [..., rows, columns]; each on its own.
        iterations: of Newton and Schulz with the quintic of Jordan et al.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller product
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; decay is decoupled, as AdamW's.

    A parameter is a matrix, or a stack of them in its leading dimensions; a group's `stacked` says how many lie above
    each other in each.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        momentum: float,
        update_rms: float,
        iterations: int,
    ) -> None:
        defaults = {"lr": learning_rate, "weight_decay": 0.0, "stacked": 1}
        super().__init__(groups, {**defaults, "momentum": momentum, "update_rms": update_rms, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])  # Nesterov
        matrices = ahead.unflatten(-2, (group["stacked"], -1))
        update = orthogonalize(matrices, group["iterations"])
        # An orthogonal matrix of n x m has a root mean square of 1 / sqrt(max(n, m)).
        scale = group["update_rms"] * max(matrices.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)
