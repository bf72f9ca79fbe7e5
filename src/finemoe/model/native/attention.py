"""Attention over spans of keys, and what a cache needs, on the native kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, last: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v, every query over its own span of keys.

    Args:
        query: [batch, heads, queries, width]; key, value: [batch, kv_heads, keys, width and value_width].
        first: [batch, queries] int64, the first key that a query sees; None: key 0.
        last: [batch, queries] int64, the key behind the last one; None: its own place plus 1.
        scale: multiplies the products.

    Returns [batch, heads, queries, value_width], laid out as [batch, queries, heads, value_width].
    """
    query, key, value = (_with_whole_rows(states) for states in (query, key, value))
    first, last = (None if bound is None else bound.contiguous() for bound in (first, last))
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        mixed: Tensor = _Attention.apply(query, key, value, first, last, scale)
        return mixed
    output = _output(query, value)
    torch.ops.finemoe.attention_forward(query, key, value, first, last, scale, output, None)
    return output


def in_blocks(query: Tensor, key: Tensor, value: Tensor, index: Tensor, last: Tensor, scale: float) -> Tensor:
    """The same over keys and values that lie in blocks `[blocks, kv_heads, size, width]`, without a gradient.

    `index [sequences, keys]` names the row of each, counting the rows of all heads of a block.
    """
    query = _with_whole_rows(query)
    output = _output(query, value)
    torch.ops.finemoe.attention_in_blocks(query, key, value, index, last.contiguous(), scale, output)
    return output


def store(states: Tensor, positions: Tensor, cache: Tensor, index: Tensor | None = None) -> None:
    """Write `states [batch, heads, seq, width]` into `cache [batch, heads, capacity, width]` at [batch, seq] places.

    With an `index` the cache is one of blocks, as above.
    """
    torch.ops.finemoe.attention_store(_with_whole_rows(states), positions, cache, index)


def _with_whole_rows(states: Tensor) -> Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def _output(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Keeps inputs, output and two numbers a query; scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, last: Tensor | None, scale: float
    ) -> Tensor:
        output, softmax = _output(query, value), query.new_empty(2, *query.shape[:3])
        torch.ops.finemoe.attention_forward(query, key, value, first, last, scale, output, softmax)
        ctx.save_for_backward(query, key, value, first, last, output, softmax)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, first, last, output, softmax = ctx.saved_tensors
        grads = [torch.empty_like(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)]
        grad = _with_whole_rows(grad)
        torch.ops.finemoe.attention_backward(grad, query, key, value, first, last, ctx.scale, output, softmax, *grads)
        return *grads, None, None, None
