"""torch's Linear and Embedding without their own first weights: `initialize` draws all, a checkpoint fills all.

Drawing twice costs seconds on a large model, and on the meta device it loads half of torch's decompositions.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from finemoe.model.backend import Backend
from finemoe.model.quantised.blocks import dequantise, is_quantised


@final
class Projection(nn.Linear):
    """x Wᵀ + b with uninitialised weights; no bias unless asked for."""

    def __init__(self, in_features: int, out_features: int, backend: Backend, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.backend.linear(input, self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Nothing: see above."""


@final
class TokenEmbedding(nn.Embedding):
    """A look-up table with uninitialised weights."""

    def forward(self, input: Tensor) -> Tensor:
        """`[...]` ids to `[..., embedding_dim]`."""
        if is_quantised(self.weight):
            return dequantise(self.weight[input], self.embedding_dim)
        return super().forward(input)

    def reset_parameters(self) -> None:
        """Nothing: see above."""
