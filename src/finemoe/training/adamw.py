"""AdamW whose two moments are kept in bfloat16, as DeepSeek-V3 trains (2412.19437, section 3.3); AdamW of pieces.

Weights and gradients stay in float32, and a step computes in float32: moments are read, moved on, used as they are
then, and rounded to nearest, ties to even, when they are written. At no time is there a copy of all of them in float32.
On a CPU one native pass does it (`model/native/adamw.cpp`), elsewhere torch in pieces: with the same bits.

A moment that changes by less than half of bfloat16's last place stays where it is. Measured over 3,000 steps of noise
whose deviation then falls to a tenth (docs/log.md, 2026-11-30), the squares are right within 0.2 % with a beta of 0.9
or 0.95 and within 10 % up to 0.996; from 0.997 on they never fall again, and remain a hundred times too large. There
1 - beta is below 2^-8, and such betas are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from finemoe.model.native.exact import adamw_step

LARGEST_BETA = 1 - 2**-8
"""Above it a moment in bfloat16 that should shrink is rounded back to what it was, for some numbers or for all."""
MOMENTS = "moments"
"""Among an optimizer's defaults: the type in which its moments are kept, where it is not the parameters'."""
_AT_ONCE, _AT_ONCE_ELSEWHERE = 1 << 18, 1 << 24
"""Numbers of a piece, on a CPU and elsewhere: what hides the cost of a call. A few such are made in float32, one after
the other."""


@dataclass(frozen=True)
class Step:
    """The numbers of one step of one parameter, as Loshchilov and Hutter (1711.05101) have it."""

    keep: float
    """1 - learning rate x decay."""
    beta1: float
    beta2: float
    eps: float
    rate: float
    """Learning rate / (1 - beta1^t)."""
    root: float
    """1 / sqrt(1 - beta2^t)."""

    @classmethod
    def of(cls, group: dict[str, Any], count: float) -> Step:
        """The `count`-th step, from 1, of a parameter of `group`."""
        beta1, beta2 = group["betas"]
        keep = 1 - group["lr"] * group["weight_decay"]
        rate = group["lr"] / (1 - beta1**count)
        return cls(keep, beta1, beta2, group["eps"], rate, (1 - beta2**count) ** -0.5)


def advance(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Step) -> None:
    """One step in plain torch, in pieces; `weight`, `first` and `second` are changed.

    Args:
        weight: of any shape and layout.
        gradient: of the weight's shape and type.
        first: mean of gradients, of the same shape, in bfloat16.
        second: mean of their squares, likewise.
        step: its numbers.
    """
    for w, g, m, v in _pieces(weight, gradient, first, second):
        # No operation here multiplies and adds at once, so that each rounds as in the native pass.
        mean = m.to(w.dtype).mul_(step.beta1).add_(g * (1 - step.beta1))
        squares = v.to(w.dtype).mul_(step.beta2).add_((g * g).mul_(1 - step.beta2))
        m.copy_(mean)
        v.copy_(squares)
        divisor = _root(squares).mul_(step.root).add_(step.eps)
        w.mul_(step.keep).sub_(mean.mul_(step.rate).div_(divisor))


def _root(squares: Tensor) -> Tensor:
    """To nearest. On a CPU torch's own is MKL's, which in float32 is off by a last place for one number in six."""
    if squares.device.type == "cpu":
        return squares.double().sqrt_().to(squares.dtype)
    return squares.sqrt_()


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few numbers each; of whole rows where one of the tensors is not contiguous."""
    most = _AT_ONCE if tensors[0].device.type == "cpu" else _AT_ONCE_ELSEWHERE
    if all(one.is_contiguous() for one in tensors):
        tensors = tuple(one.view(-1) for one in tensors)
    row = max(1, tensors[0].numel() // max(1, len(tensors[0])))
    return zip(*(one.split(max(1, most // row)) for one in tensors), strict=True)


def _begun(state: dict[str, Tensor], parameter: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A parameter's state, with moments in `dtype`, under torch's own names."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
    return state


@final
class AdamWOfPieces(torch.optim.Optimizer):
    """torch's fused AdamW over what lies here of parameters that are cut over processes, with the same bits.

    torch's own steps them too, and works out anew at every step how hundreds of tensors are cut, in Python; moments
    are cut as the parameters are.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        local: Callable[[Tensor], Tensor],
    ) -> None:
        """`local`: of a tensor that is cut over processes, the piece that lies here."""
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._local = local

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            found = [one for one in group["params"] if one.grad is not None]
            states = [_begun(self.state[one], one, one.dtype) for one in found]
            beta1, beta2 = group["betas"]
            adamw(
                [self._local(one) for one in found],
                [self._local(one.grad) for one in found],
                [self._local(state["exp_avg"]) for state in states],
                [self._local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@final
class CompactAdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay over parameters in float32; its state is called as torch's own is, for checkpoints."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        local: Callable[[Tensor], Tensor],
    ) -> None:
        """`local`: of a tensor that is cut over processes, the piece that lies here."""
        defaults = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": 0.0, MOMENTS: torch.bfloat16}
        super().__init__(groups, defaults)
        self._local = local

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        found = [(one, group) for group in self.param_groups for one in group["params"] if one.grad is not None]
        if not found:
            return
        counts = [_begun(self.state[one], one, torch.bfloat16)["step"] for one, _ in found]
        torch._foreach_add_(counts, 1)
        for (parameter, group), count in zip(found, torch.stack(counts).tolist(), strict=True):  # a GPU waits once
            self._update(parameter, Step.of(group, count))

    def _update(self, parameter: Tensor, step: Step) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None  # as `step` saw
        held = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weight, gradient, first, second = map(self._local, held)
        if not adamw_step(weight, gradient, first, second, astuple(step)):
            advance(weight, gradient, first, second, step)
