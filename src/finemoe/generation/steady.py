"""What makes completions depend on their request alone, to the last bit, whatever runs beside them.

An engine packs a pass as full as it can, so that the shape of a matrix product, and with it the rounding of its sums,
depends on the neighbours: enough to turn a near tie around. In a steady one every prompt is read by itself, in a pass
of at least `least_tokens`, and every step decodes `steady_rows` rows, idle ones among them. A pass of so few rows is
bounded by reading the weights, so that idle rows cost little.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from finemoe.model.backends import all_native
from finemoe.model.moe.layer import MoELayer
from finemoe.model.transformer import Transformer

FEW_ROWS = 64
"""The C++ products take another way, which rounds differently, for fewer rows than these,"""
_FEW_OF_EACH = 8
"""and in passes of more, where every expert has fewer rows than these."""
LEAST_WIDTH = 32
"""So does attention, for no more queries than 16 or 28."""
_LANES = 64
"""PyTorch's sigmoid rounds the last numbers of its tensor, fewer than these, in another way than the rest,"""
_GRAIN = 1 << 15
"""and gives each thread a tensor of its own, where there are more numbers than these for each."""
_SLOTS = 32
"""Rows of a decoding step where the C++ products do not run."""
_NATIVE_SLOTS = 7
"""At most, where they do: idle ones still cost little."""


def steady(model: Transformer) -> bool:
    """Whether what the model makes of a row depends on that row alone, in passes of at least `least_tokens` tokens.

    True of the C++ kernels; the libraries behind PyTorch choose how to add up by the shape of the whole pass.
    """
    experts = (tensor for layer in model.moe_layers.values() for tensor in _experts(layer))
    return all_native(model.kernels, model.embedding.weight, *experts)


def _experts(layer: MoELayer) -> Iterable[Tensor]:
    return (layer.experts.gate_up_proj, layer.experts.down_proj)


def least_tokens(model: Transformer) -> int:
    """Tokens of a pass with which some expert of every layer has enough rows for all to go the usual way."""
    layers = (layer.config for layer in model.moe_layers.values())
    least = ((_FEW_OF_EACH - 1) * c.num_routed_experts // c.experts_per_token + 1 for c in layers)
    return max(FEW_ROWS, *least, LEAST_WIDTH)


def width_for(model: Transformer, rows: int, width: int) -> int:
    """The width, at least `width`, of a pass of `rows` rows in which no row is treated in a way of its own."""
    width = max(width, LEAST_WIDTH, -(-least_tokens(model) // rows))
    wide = _sigmoid_widths(model)
    while any(_is_uneven(rows * width * size) for size in wide):
        width += 1
    return width


def _is_uneven(numbers: int) -> bool:
    threads = min(torch.get_num_threads(), -(-numbers // _GRAIN))
    return numbers % (threads * _LANES) != 0


def _sigmoid_widths(model: Transformer) -> set[int]:
    """How many numbers of a token go through PyTorch's sigmoid at once."""
    configs = [layer.config for layer in model.moe_layers.values()]
    # Scores that do not sum to one are taken expert by expert.
    routers = {c.num_routed_experts for c in configs if not c.router.scores_sum_to_one}
    return routers | ({1} if any(c.gate_shared_experts for c in configs) else set())


def steady_rows(model: Transformer) -> int:
    """Rows of every decoding step in which what a row gets depends on it alone."""
    if not steady(model):
        return _SLOTS
    wide = _sigmoid_widths(model)
    return next((n for n in range(_NATIVE_SLOTS, 0, -1) if not any(n * size % _LANES for size in wide)), 1)
