"""The dense feed-forward layer: SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from finemoe.core.config import Config
from finemoe.model.backend import Backend
from finemoe.model.projection import Projection
from finemoe.model.quantised.blocks import dequantise, is_quantised


class DenseConfig(Config):
    """One SwiGLU for every token. Also the form of "Dense x4" and "Dense x16": the width is a multiple."""

    kind: Literal["dense"] = "dense"
    ffn_hidden_size: PositiveInt
    """[components] Intermediate width; the papers' standard is 8/3 of the hidden size."""
    swiglu_limit: PositiveFloat | None = None
    """[activation] Clamp as in DeepSeek-V4: gate at most this, up within plus and minus this."""

    def num_parameters(self, hidden_size: int) -> int:
        """All weights: gate, up and down projections."""
        return 3 * hidden_size * self.ffn_hidden_size

    def num_active_parameters(self, hidden_size: int) -> int:
        """Weights that one token passes through: all of them."""
        return self.num_parameters(hidden_size)


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) · up, both clamped first where a limit is set."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states [..., in]` times `weight [out, in]`, or blocks of it, transposed, plus `bias [out]`: `[..., out]`."""
    if is_quantised(weight):
        weight = dequantise(weight, states.shape[-1]).to(states.dtype)
    return F.linear(states, weight, bias)


def feed_forward(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    """`hidden [..., hidden]` through the weights `gate` and `up [width, hidden]` and `down [hidden, width]`."""
    return linear(swiglu(linear(hidden, gate), linear(hidden, up), limit), down)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), no biases."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, backend: Backend, limit: float | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.limit = limit
        self.gate_proj = Projection(hidden_size, ffn_hidden_size, backend)
        self.up_proj = Projection(hidden_size, ffn_hidden_size, backend)
        self.down_proj = Projection(ffn_hidden_size, hidden_size, backend)

    def parts(self) -> tuple[Any, ...]:
        """All that the layer computes with, for one call."""
        limit = math.inf if self.limit is None else self.limit
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, limit

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return self.backend.swiglu(hidden, *weights, self.limit)
