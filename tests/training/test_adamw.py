"""AdamW with moments in bfloat16: against its lines in numpy, its native pass against the plain one, bit for bit."""

from __future__ import annotations

import logging
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finemoe.model import native
from finemoe.model.native.exact import adamw_step
from finemoe.training import adamw
from finemoe.training.adamw import LARGEST_BETA, CompactAdamW, Step, advance
from finemoe.training.method import Group
from finemoe.training.optimizers import (
    AdamWConfig,
    Selected,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
)

CONFIG = AdamWConfig(learning_rate=0.01, weight_decay=0.3, moments="bf16")
GROUP = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.95), "eps": 1e-8}
NEEDS_KERNELS = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
SHAPES = [(), (0, 3), (7,), (3, 5, 11), (257, 129)]


def nearest(values: np.ndarray) -> np.ndarray:
    """bfloat16's bits of float32 numbers: the upper half, up where the lower is above its middle, or there and odd."""
    bits = values.astype(np.float32).view(np.uint32)
    upper, lower = bits >> 16, bits & 0xFFFF
    return (upper + ((lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1)))).astype(np.uint32)


class Obvious:
    """One weight in numpy, each operation in float32; moments as bits of bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().numpy().copy()
        self.first = self.second = np.zeros(self.weight.shape, np.uint32)
        self.count = 0

    def step(self, gradient: Tensor, config: AdamWConfig) -> None:
        self.count += 1
        f, (b1, b2), rate, g = np.float32, config.betas, config.learning_rate, gradient.numpy()
        mean = (self.first << 16).view(f) * f(b1) + g * f(1 - b1)
        squares = (self.second << 16).view(f) * f(b2) + g * g * f(1 - b2)
        self.first, self.second = nearest(mean), nearest(squares)
        decayed = self.weight * f(1 - rate * config.weight_decay)
        divisor = np.sqrt(squares) * f((1 - b2**self.count) ** -0.5) + f(config.eps)
        self.weight = decayed - mean * f(rate / (1 - b1**self.count)) / divisor


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy().astype(np.uint32)


def gradient_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """Of many sizes, some of them 0."""
    stream = torch.Generator().manual_seed(seed)
    normal, size = torch.randn(shape, generator=stream), torch.rand(shape, generator=stream)
    return normal * 10 ** (-12 * size) * (size < 0.9)


def compact(config: AdamWConfig, **named: nn.Parameter) -> CompactAdamW:
    [made] = build_optimizers(config, [Selected(name, one, Group()) for name, one in named.items()])
    assert isinstance(made, CompactAdamW)
    return made


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=NEEDS_KERNELS)])
def test_every_step_is_its_lines_in_numpy(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    monkeypatch.setattr(adamw, "_AT_ONCE", 1000)  # several pieces, the last of them smaller
    if plain:
        monkeypatch.setattr(adamw, "adamw_step", lambda *_: False)
    else:
        monkeypatch.setattr(adamw, "advance", None)
    weight = nn.Parameter(torch.randn(257, 129))
    theirs, ours = Obvious(weight), compact(CONFIG, weight=weight)
    for seed in range(12):
        weight.grad = gradient_of((257, 129), seed)
        theirs.step(weight.grad, CONFIG)
        ours.step()
    state = ours.state[weight]
    assert state["step"] == 12
    assert np.array_equal(bits(state["exp_avg"]), theirs.first)
    assert np.array_equal(bits(state["exp_avg_sq"]), theirs.second)
    assert np.array_equal(weight.detach().numpy(), theirs.weight)


def four(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, gradient and moments, as in the middle of a run."""
    first, second = gradient_of(shape, seed + 1), gradient_of(shape, seed + 2).square()
    return torch.randn(shape), gradient_of(shape, seed), first.bfloat16(), second.bfloat16()


@NEEDS_KERNELS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_native_pass_is_the_plain_one_to_the_bit(shape: tuple[int, ...]) -> None:
    ours = four(shape)
    theirs = tuple(one.clone() for one in ours)
    for count in (1, 2, 50):
        step = Step.of(GROUP, count)
        assert adamw_step(*ours, astuple(step))
        advance(*theirs, step)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@NEEDS_KERNELS
def test_what_is_no_number_too_large_or_next_to_nothing_is_as_in_torch() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-42, -1e-20, 0.0, -0.0])
    gradient = odd.repeat(9)
    weight, moment = odd.repeat_interleave(9), odd.roll(1).repeat_interleave(9).bfloat16()
    ours = (weight, gradient, moment, moment.abs())
    theirs = tuple(one.clone() for one in ours)
    assert adamw_step(*ours, astuple(Step.of(GROUP, 3)))
    advance(*theirs, Step.of(GROUP, 3))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@NEEDS_KERNELS
def test_the_number_of_threads_changes_nothing() -> None:
    one = four((1000, 257))  # several threads' worth
    two = tuple(tensor.clone() for tensor in one)
    assert adamw_step(*one, astuple(Step.of(GROUP, 4)))
    torch.set_num_threads(2)
    try:
        assert adamw_step(*two, astuple(Step.of(GROUP, 4)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, two, strict=True))


@NEEDS_KERNELS
def test_tensors_that_do_not_go_together_are_refused_by_the_kernel() -> None:
    weight, gradient, first, second = four((4, 6))
    numbers = astuple(Step.of(GROUP, 1))
    with pytest.raises(RuntimeError, match="gradient must have the shape of the weight"):
        torch.ops.finemoe.adamw(weight, gradient[:2], first, second, *numbers)
    with pytest.raises(RuntimeError, match="exp_avg_sq must be contiguous BFloat16 numbers"):
        torch.ops.finemoe.adamw(weight, gradient, first, second.float(), *numbers)


def test_weights_in_rows_that_lie_apart_are_stepped_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_AT_ONCE", 40)
    whole = four((16, 33))
    apart = tuple(one.T.contiguous().T for one in whole)
    assert not adamw_step(*apart, astuple(Step.of(GROUP, 1)))
    advance(*whole, Step.of(GROUP, 1))
    advance(*apart, Step.of(GROUP, 1))
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))


class Largest(TorchDispatchMode):
    """[numbers] Of the largest tensor in float32, or wider, that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, Tensor) and one.itemsize >= 4 and one.untyped_storage().data_ptr() not in known:
                self.numbers = max(self.numbers, one.numel())
        return made


def test_no_moment_is_ever_whole_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_AT_ONCE", 100)
    held = four((300, 7))
    with Largest() as largest:
        advance(*held, Step.of(GROUP, 1))
    assert 0 < largest.numbers <= 100


def test_twenty_steps_are_near_those_of_torch() -> None:
    ours, theirs = (nn.Parameter(torch.randn(50, 40, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    begun = ours.detach().clone()
    [other] = build_optimizers(CONFIG.model_copy(update={"moments": "fp32"}), [Selected("weight", theirs, Group())])
    assert isinstance(other, torch.optim.AdamW)
    own = compact(CONFIG, weight=ours)
    for seed in range(20):
        ours.grad = torch.randn(50, 40, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        for one in (own, other):
            one.step()
    moved = (theirs - begun).norm()
    assert 0 < (ours - theirs).norm() < 0.005 * moved


def test_a_parameter_without_gradient_stays_and_is_not_counted() -> None:
    stays, moves = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    before = stays.detach().clone()
    optimizer = compact(CONFIG, stays=stays, moves=moves)
    optimizer.step()
    assert not optimizer.state
    moves.grad = torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(stays, before)
    assert list(optimizer.state) == [moves]


# ---- what bfloat16 can follow ----------------------------------------------------------------------------------------


def after_a_step_of_zeros(beta2: float) -> tuple[Tensor, Tensor]:
    """Squares of every significand that bfloat16 has, before and after."""
    before = (1 + torch.arange(128) / 128).bfloat16()
    after = before.clone()
    group = {**GROUP, "betas": (0.9, beta2)}
    advance(torch.ones(128), torch.zeros(128), torch.zeros(128).bfloat16(), after, Step.of(group, 100))
    return before, after


def test_up_to_the_largest_beta_every_square_falls_and_above_it_some_do_not() -> None:
    for beta2 in (0.9, 0.95, 0.99, LARGEST_BETA):
        before, after = after_a_step_of_zeros(beta2)
        assert (after < before).all(), beta2
    for beta2 in (0.9962, 0.997):
        before, after = after_a_step_of_zeros(beta2)
        assert (after == before).any(), beta2
    before, after = after_a_step_of_zeros(0.999)
    assert torch.equal(after, before)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.997, 0.95)])
def test_betas_that_it_cannot_follow_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match=r"beta of 0\.99\d stands still .* make betas 0\.996 or less"):
        AdamWConfig(learning_rate=0.01, betas=betas, moments="bf16")
    assert AdamWConfig(learning_rate=0.01, betas=betas).moments == "fp32"
    assert AdamWConfig(learning_rate=0.01, betas=(0.996, 0.996), moments="bf16").state_bytes == 4


# ---- state -----------------------------------------------------------------------------------------------------------


def stepped(moments: str, seeds: range) -> tuple[nn.Parameter, Any]:
    weight = nn.Parameter(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    [made] = build_optimizers(CONFIG.model_copy(update={"moments": moments}), [Selected("weight", weight, Group())])
    for seed in seeds:
        weight.grad = gradient_of((9, 5), seed)
        made.step()
    return weight, made


def test_state_round_trip_continues_bit_for_bit(caplog: pytest.LogCaptureFixture) -> None:
    through, first = stepped("bf16", range(3))
    saved = {key: one.clone() for key, one in optimizer_tensors([first], {"weight": through}).items()}
    assert {key: one.dtype for key, one in saved.items()} == {
        "weight/step": torch.float32,
        "weight/exp_avg": torch.bfloat16,
        "weight/exp_avg_sq": torch.bfloat16,
    }
    resumed, second = stepped("bf16", range(0))
    resumed.data.copy_(through.data)
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        load_optimizer_tensors([second], {"weight": resumed}, saved)
    assert not caplog.records
    for weight, one in ((through, first), (resumed, second)):
        weight.grad = gradient_of((9, 5), 7)
        one.step()
    assert torch.equal(through, resumed)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_moments_saved_in_the_other_type_are_converted_and_it_is_said(
    caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    weight, first = stepped(before, range(3))
    saved = {key: one.clone() for key, one in optimizer_tensors([first], {"weight": weight}).items()}
    _, second = stepped(after, range(0))
    other = second.param_groups[0]["params"][0]
    with caplog.at_level(logging.WARNING, logger="finemoe"):
        load_optimizer_tensors([second], {"weight": other}, saved)
    names = {"fp32": "float32", "bf16": "bfloat16"}
    [said] = [record.getMessage() for record in caplog.records]
    assert f"were saved in {names[before]} and go on in {names[after]}, as optimizer.moments says" in said
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[after]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(second.state[other][key], saved[f"weight/{key}"].to(dtype))
    assert second.state[other]["step"] == 3
    other.grad = gradient_of((9, 5), 7)
    second.step()  # torch's own would refuse moments of another type than the weight


@pytest.mark.gpu
def test_a_gpu_steps_as_a_cpu_does() -> None:
    held = four((300, 70))
    there = tuple(one.to("cuda") for one in held)
    for count in (1, 2):
        advance(*held, Step.of(GROUP, count))
        advance(*there, Step.of(GROUP, count))
    for ours, theirs in zip(there, held, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0.01 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-7)
