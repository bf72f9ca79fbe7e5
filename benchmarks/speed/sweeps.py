"""The growth of cost, measured: an MoE layer against its sizes, a model against the length of its context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.growth import Growth, doubling
from benchmarks.speed.layers import OWN_DENSE, TORCH_DENSE, dense_calls, moe_call, moe_calls
from benchmarks.speed.shapes import LayerShape
from benchmarks.speed.table import Row
from benchmarks.speed.timing import Contestant, Samples, calling, calls_needed, fastest, interleave

from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.config import Kernels
from finemoe.model.size import training_flops_per_token

BASE = LayerShape(hidden=512, tokens=1024, experts=64, width=344, top_k=7)
_ROUTED = replace(BASE, shared=0)


def _wider(hidden: int) -> LayerShape:
    return replace(BASE, hidden=hidden, width=BASE.width * hidden // BASE.hidden)


SWEEPS: Mapping[str, tuple[Sequence[int], Callable[[int], LayerShape]]] = {
    "width": (doubling(128, 1024), _wider),
    "experts": (doubling(16, 256), lambda experts: replace(BASE, experts=experts)),
    "experts per token": (doubling(1, 8), lambda top_k: replace(_ROUTED, top_k=top_k)),
    "tokens": (doubling(256, 8192), lambda tokens: replace(BASE, tokens=tokens)),
}
"""What grows -> its sizes, and the layer at each; width means that of model and experts."""
CONTEXTS = doubling(256, 8192)
ATTENTIONS = {"grouped-query": shapes.grouped_query(8, 8), "latent": shapes.latent(8, 256, 128)}
_STEP_TOKENS = 2048  # of all sequences together, or one sequence where that is longer
_SECONDS = 2.0  # spent on one point where more repetitions fit in


def growth(context: Context) -> list[Row]:
    """All sweeps, into `context.growth`."""
    kernel = best_kernel(context)
    for variable, (sizes, at) in SWEEPS.items():
        layer_sweep(context, variable, _some(sizes, context), at, kernel)
    for name, attention in ATTENTIONS.items():
        context_sweep(context, name, attention, _some(CONTEXTS, context))
    return []


def _some(sizes: Sequence[int], context: Context) -> list[int]:
    return list(sizes[:3] if context.quick else sizes)


def _repeats(context: Context) -> int:
    return min(3, context.repeats)


def _measure(context: Context, calls: Mapping[str, Callable[[], Any]], where: str) -> Samples:
    number = calls_needed(next(iter(calls.values())), 0.1)
    contestants = [Contestant(name, calling(call, number)) for name, call in calls.items()]

    def watch(text: str) -> None:
        context.watch(f"{where}: {text}")

    return interleave(contestants, _repeats(context), budget=context.seconds(_SECONDS), watch=watch)


def best_kernel(context: Context) -> str:
    """The kernel that is fastest at the size from which the sweeps start."""
    calls = moe_calls(BASE, context)
    samples = _measure(context, calls, "choosing a kernel")
    return fastest(samples, [name for name in samples if name in EXPERT_KERNELS])


def layer_sweep(
    context: Context, variable: str, sizes: Sequence[int], at: Callable[[int], LayerShape], kernel: str
) -> None:
    """One of `SWEEPS`: the MoE layer, and the dense one of as many active parameters."""
    seconds: dict[str, list[tuple[float, ...]]] = {"moe": [], TORCH_DENSE: []}
    for size in sizes:
        shape = at(size)
        calls = {"moe": moe_call(shape, Kernels(experts=kernel)), **dense_calls(shape)}
        calls.pop(OWN_DENSE)
        samples = _measure(context, calls, f"{variable} {size}")
        for name in seconds:
            seconds[name].append(tuple(one / shape.tokens for one in samples[name]))
    flops = tuple(at(size).flops / at(size).tokens for size in sizes)
    for name, what in (("moe", f"MoE layer ({kernel})"), (TORCH_DENSE, "  torch dense, as many active")):
        context.growth.append(Growth(what, variable, tuple(sizes), tuple(seconds[name]), flops))


def context_sweep(context: Context, name: str, attention: shapes.Table, lengths: Sequence[int]) -> None:
    """Forward and backward of a model of one block, without its head, by the length of its sequences."""
    table = {"vocab_size": 512, "hidden_size": 512, "num_layers": 1, "attention": attention}
    config = shapes.model_config({**table, "feed_forward": shapes.dense(1376)})
    model = shapes.build(config).train()
    seconds, flops = [], []
    head = 6.0 * config.vocab_size * config.hidden_size
    for length in lengths:
        sequences = max(1, _STEP_TOKENS // length)
        tokens = torch.tensor(shapes.token_ids(config, sequences, length))
        call = _model_call(model, tokens)
        samples = _measure(context, {name: call}, f"context {length}")
        seconds.append(tuple(one / tokens.numel() for one in samples[name]))
        flops.append(training_flops_per_token(config, length) - head)
    context.growth.append(Growth(f"model, {name}", "context", tuple(lengths), tuple(seconds), tuple(flops)))


def _model_call(model: Any, tokens: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens).hidden.sum().backward()

    return call
