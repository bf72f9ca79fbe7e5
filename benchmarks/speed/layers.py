"""An MoE layer beside dense layers of as many active parameters: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmarks.speed import shapes
from benchmarks.speed.context import Context
from benchmarks.speed.shapes import LayerShape
from benchmarks.speed.table import Measured, Row
from benchmarks.speed.timing import Contestant, Samples, calling, calls_needed, fastest, interleave, ratios
from torch import Tensor
from torch.nn import functional as F

from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.config import Kernels
from finemoe.model.native import available

WIDE = LayerShape(hidden=512, tokens=2048, experts=63, width=344, top_k=7)
NARROW = LayerShape(hidden=128, tokens=4096, experts=63, width=64, top_k=7)
TORCH_DENSE, OWN_DENSE, PURE = "torch dense", "own dense", "pure torch"
_SECONDS = 20.0  # spent on one comparison where more repetitions fit in


class PlainDense:
    """A SwiGLU as anyone would write it in torch: the peer."""

    def __init__(self, hidden: int, width: int) -> None:
        shapes_ = ((width, hidden), (width, hidden), (hidden, width))
        self.weights = [(torch.randn(shape) * shape[1] ** -0.5).requires_grad_() for shape in shapes_]

    def parameters(self) -> list[Tensor]:
        """Gate, up and down."""
        return self.weights

    def __call__(self, states: Tensor) -> Tensor:
        """`[..., hidden]` in and out."""
        gate, up, down = self.weights
        return F.linear(F.silu(F.linear(states, gate)) * F.linear(states, up), down)


def both_ways(run: Callable[[Tensor], Tensor], parameters: list[Tensor], hidden: int, tokens: int) -> Callable[[], Any]:
    """A call of forward and backward, with gradients of weights and input, as in a training step."""
    states = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(2)).requires_grad_()
    gradient = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(3))

    def call() -> Tensor:
        for tensor in (states, *parameters):
            tensor.grad = None
        output = run(states)
        output.backward(gradient)
        return output

    return call


def moe_call(shape: LayerShape, kernels: Kernels) -> Callable[[], Any]:
    """Forward and backward of our layer."""
    layer = shapes.layer(shape.hidden, shape.table(), kernels)
    tokens = torch.zeros(1, shape.tokens, dtype=torch.int64)

    def run(states: Tensor) -> Tensor:
        output: Tensor = layer(states, tokens, constraint=None, record=False)[0]
        return output

    return both_ways(run, list(layer.parameters()), shape.hidden, shape.tokens)


def dense_calls(shape: LayerShape) -> dict[str, Callable[[], Any]]:
    """Forward and backward of plain torch's SwiGLU and of ours."""
    plain = PlainDense(shape.hidden, shape.active_width)
    own = shapes.layer(shape.hidden, shapes.dense(shape.active_width))
    sizes = (shape.hidden, shape.tokens)
    return {
        TORCH_DENSE: both_ways(plain, plain.parameters(), *sizes),
        OWN_DENSE: both_ways(own, list(own.parameters()), *sizes),
    }


def moe_calls(shape: LayerShape, context: Context) -> dict[str, Callable[[], Any]]:
    """One call for each kernel that runs here; all give the same result, or it is an error."""
    kernels = {name: Kernels(experts=name) for name in EXPERT_KERNELS if name != "auto"}  # auto is one of the others
    if not available():
        context.note("the native kernels cannot be used on this machine: their rows are missing")
        kernels.pop("native")
    calls = {name: moe_call(shape, chosen) for name, chosen in kernels.items()}
    calls[PURE] = moe_call(shape, shapes.PURE_TORCH)
    outputs = {name: call().detach() for name, call in calls.items()}
    for name, output in outputs.items():
        error = float((output - outputs["loop"]).abs().max() / outputs["loop"].abs().max())
        if error > 1e-4:
            raise RuntimeError(f"kernel {name} is off by {error:.1e} from loop")
    return calls


def measure(shape: LayerShape, context: Context) -> Samples:
    """Seconds of one forward and backward, by kernel or dense layer."""
    calls = {**moe_calls(shape, context), **dense_calls(shape)}
    number = calls_needed(calls[TORCH_DENSE])
    contestants = [Contestant(name, calling(call, number)) for name, call in calls.items()]
    return interleave(contestants, context.repeats, budget=context.seconds(_SECONDS), watch=context.watch)


def rows_of(key: str, samples: Samples, goals: tuple[float, float]) -> list[Row]:
    """The best kernel against plain torch's dense layer, and every other pair."""
    best = fastest(samples, [name for name in samples if name not in (TORCH_DENSE, OWN_DENSE)])
    target, stretch = goals

    def row(what: str, ours: str, peer: str, **more: Any) -> Row:
        values = ratios(samples[ours], samples[peer])
        return Row(key, what, Measured(ours, samples[ours]), Measured(peer, samples[peer]), values, **more)

    width = key.removeprefix("layer-")
    named = f"MoE / torch dense, {width} ({best})"
    rows = [row(named, best, TORCH_DENSE, target=target, stretch=stretch)]
    rows += [row(f"  {name}", name, TORCH_DENSE) for name in samples if name not in (best, TORCH_DENSE, OWN_DENSE)]
    rows.append(row(f"  {best} / own dense", best, OWN_DENSE))
    rows.append(row("  own dense / torch dense", OWN_DENSE, TORCH_DENSE))
    return rows


def wide(context: Context) -> list[Row]:
    """Width 512."""
    return rows_of("layer-512", measure(_smaller(WIDE, context), context), (1.10, 1.05))


def narrow(context: Context) -> list[Row]:
    """Width 128."""
    return rows_of("layer-128", measure(_smaller(NARROW, context), context), (1.20, 1.12))


def _smaller(shape: LayerShape, context: Context) -> LayerShape:
    return replace(shape, tokens=shape.tokens // 4) if context.quick else shape
