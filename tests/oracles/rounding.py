"""What float32 may cost: the same computation in float64, every result of which is off by a drawn rounding error.

A sum of n products in float32 rounds n products, each by up to u = 2^-24 of itself, and n - 1 partial sums, each by up
to u of itself. Evenly drawn within those bounds, with V the sum of the squared products and S the result: the products
contribute u²/3 · V; the k-th partial sum is a random walk of about V · k / n plus its way to S, hence at most
(V + S²) · k / n squared, and all of them contribute u²/3 · (V + S²) · n / 2. That is one addition after the other. A
kernel that adds in lanes, or with fused products, rounds less often, and torch's own error is one draw of luck: a bound
made of it fails now and then on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
_DRAWS = 12
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1}
"""And where the first factor stands among the arguments."""
_SUMS = {_aten.sum.dim_IntList, _aten.sum.default}
_SINGLE = {
    *(_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.div.Tensor, _aten.exp.default, _aten.sigmoid.default),
    *(_aten.silu.default, _aten.silu_backward.default, _aten.sigmoid_backward.default),
}


class _Rounding(TorchDispatchMode):
    """Adds to what torch computes in float64 what its rounding in float32 might have been, forward and backward."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (isinstance(result, Tensor) and result.is_floating_point()):
            return result
        if function in _PRODUCTS:
            left, right = args[_PRODUCTS[function] :][:2]
            return _moved(result, left.square() @ right.square(), left.shape[-1])
        if function in _SUMS:
            terms = max(1, args[0].numel() // max(1, result.numel()))
            return _moved(result, function(args[0].square(), *args[1:], **(kwargs or {})), terms)
        if function in _SINGLE:
            return _moved(result, torch.zeros_like(result), 1)
        return result


def _moved(result: Tensor, squares: Tensor, terms: int) -> Tensor:
    variance = squares + (squares + result.square()) * terms / 2
    return result + torch.randn_like(result) * (UNIT * (variance / 3).sqrt())


def rounding_error(compute: Callable[[], tuple[Tensor, ...]], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest distance from `exact` that float32 reaches in a dozen draws, for each result of `compute`.

    `compute` works in float64, from leaves that are not rounded any more.
    """
    worst = [0.0] * len(exact)
    for _ in range(_DRAWS):
        with _Rounding():
            drawn = compute()
        errors = [(mine - truth).abs().max().item() for mine, truth in zip(drawn, exact, strict=True)]
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst
