"""What lies between an MoE layer's products, and the products themselves, beside plain torch: forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from benchmarks.speed.context import Context
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, calling, calls_needed, interleave, ratios
from torch import Tensor

from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH
from finemoe.model.native import available

_SECONDS = 4.0  # spent on one comparison where more repetitions fit in
Operation = Callable[[Backend, list[Tensor]], Tensor]


def _drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(shape, generator=generator) * shape[-1] ** -0.5).requires_grad_() for shape in shapes]


def _attention(backend: Backend, given: list[Tensor]) -> Tensor:
    query, key, value = given
    return backend.attend(query, key, value, None, query.shape[-1] ** -0.5)


def _norm(backend: Backend, given: list[Tensor]) -> Tensor:
    return backend.rms_norm(given[0], given[1], 1e-6)


def _linear(backend: Backend, given: list[Tensor]) -> Tensor:
    return backend.linear(given[0], given[1], None)


def _swiglu(backend: Backend, given: list[Tensor]) -> Tensor:
    return backend.swiglu(given[0], given[1], given[2], given[3], None)


def _loss(backend: Backend, given: list[Tensor]) -> Tensor:
    hidden, head = given
    targets = torch.arange(len(hidden)) * 7 % len(head)
    return backend.cross_entropy_sum(hidden, head, targets, torch.ones(len(hidden)))


def _heads(heads: int, kv_heads: int, seq: int, width: int, value: int) -> list[tuple[int, ...]]:
    return [(1, heads, seq, width), (1, kv_heads, seq, width), (1, kv_heads, seq, value)]


OPERATIONS: Mapping[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "attention, 16 heads of 64, 1024 tokens": (_attention, _heads(16, 16, 1024, 64, 64)),
    "attention, 16 heads over 4, 2048 tokens": (_attention, _heads(16, 4, 2048, 64, 64)),
    "attention, latent: 192 and 128, 512 tokens": (_attention, _heads(16, 16, 512, 192, 128)),
    "attention, 8 heads of 128, 4096 tokens": (_attention, _heads(8, 8, 4096, 128, 128)),
    "norm, 2048 x 512": (_norm, [(2048, 512), (512,)]),
    "norm, 1024 x 2048": (_norm, [(1024, 2048), (2048,)]),
    "loss, 1024 tokens of 128, vocabulary 2048": (_loss, [(1024, 128), (2048, 128)]),
    "loss, 1024 tokens of 512, vocabulary 12288": (_loss, [(1024, 512), (12288, 512)]),
    "loss, 512 tokens of 576, vocabulary 49152": (_loss, [(512, 576), (49152, 576)]),
    "linear, 1024 x 128 x 512": (_linear, [(1024, 128), (512, 128)]),
    "linear, 2048 x 512 x 512": (_linear, [(2048, 512), (512, 512)]),
    "linear, 1024 x 1024 x 2752": (_linear, [(1024, 1024), (2752, 1024)]),
    "SwiGLU, 2048 x 128 x 352": (_swiglu, [(2048, 128), (352, 128), (352, 128), (128, 352)]),
    "SwiGLU, 1024 x 1024 x 2752": (_swiglu, [(1024, 1024), (2752, 1024), (2752, 1024), (1024, 2752)]),
}
"""Each with the shapes of what it takes."""


def _both_ways(operation: Operation, backend: Backend, shapes: list[tuple[int, ...]]) -> Any:
    given = _drawn(*shapes)
    flow = torch.ones_like(operation(backend, given))

    def call() -> Any:
        for tensor in given:
            tensor.grad = None
        operation(backend, given).backward(flow)

    return call


def operations(context: Context) -> list[Row]:
    """A row each: none is to be slower than plain torch, or "auto" would have to choose."""
    if not available():
        context.note("the native kernels cannot be used on this machine: their rows are missing")
        return []
    rows = []
    for what, (operation, shapes) in OPERATIONS.items():
        context.watch(what)
        made = {name: _both_ways(operation, backend, shapes) for name, backend in _BACKENDS.items()}
        number = calls_needed(made["torch"])
        contestants = [Contestant(name, calling(call, number)) for name, call in made.items()]
        samples = interleave(contestants, context.repeats, budget=context.seconds(_SECONDS), watch=context.watch)
        sides = [Measured(name, samples[name]) for name in made]
        values = ratios(samples["finemoe"], samples["torch"])
        rows.append(Row("operations", f"{what} / torch", sides[0], sides[1], values, target=1.0))
    return rows


_BACKENDS = {"finemoe": NATIVE, "torch": TORCH}
