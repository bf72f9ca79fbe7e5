"""What the native kernels are given: laid out in any way, of the right size, and differentiated once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finemoe.model import native
from finemoe.model.backends import NATIVE, TORCH
from finemoe.model.native.exact import sort_by_expert, top_k
from finemoe.model.native.experts import experts as native_experts

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

HIDDEN, WIDTH, COUNTS = 20, 24, (3, 0, 9)


def apart(*shape: int) -> Tensor:
    """Every second of a larger tensor's."""
    return torch.randn(2 * shape[0], *shape[1:])[::2]


def turned(*shape: int) -> Tensor:
    """A transposed view."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


def loss(backend: object, hidden: Tensor, head: Tensor) -> Tensor:
    return backend.cross_entropy_sum(  # type: ignore[attr-defined, no-any-return]
        hidden, head, torch.arange(len(hidden)) % len(head), torch.ones(len(hidden))
    )


KERNELS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (lambda b, x, w: b.linear(x, w, None), [(9, HIDDEN), (WIDTH, HIDDEN)]),
    "SwiGLU": (
        lambda b, *x: b.swiglu(*x, None), [(9, HIDDEN), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    ),
    "experts": (
        lambda b, *x: b.experts(x[0], torch.tensor(COUNTS), *x[1:], None),
        [(12, HIDDEN), (3, 2 * WIDTH, HIDDEN), (3, HIDDEN, WIDTH)],
    ),
    "loss": (loss, [(9, HIDDEN), (WIDTH, HIDDEN)]),
}  # fmt: skip


@pytest.mark.parametrize("layout", [apart, turned])
@pytest.mark.parametrize("name", KERNELS)
def test_weights_may_lie_in_any_way(name: str, layout: Callable[..., Tensor]) -> None:
    compute, shapes = KERNELS[name]
    torch.manual_seed(0)
    inputs = [layout(*shape).requires_grad_() for shape in shapes]
    found = [output := compute(NATIVE, *inputs), *torch.autograd.grad(output.sum(), inputs)]
    wanted = [output := compute(TORCH, *inputs), *torch.autograd.grad(output.sum(), inputs)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [NATIVE, TORCH], ids=["native", "torch"])
@pytest.mark.parametrize("name", ["experts", "loss"])
def test_a_gradient_by_hand_has_none_itself(name: str, backend: object) -> None:
    """It would be taken for a constant, and whatever is built on it would be wrong without a word."""
    compute, shapes = KERNELS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    first, *_ = torch.autograd.grad(compute(backend, *inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        first.square().sum().backward()


def test_a_sum_over_nothing_flows_back_through_a_rotation() -> None:
    states, angles = torch.randn(2, 3, 0, 8, requires_grad=True), torch.zeros(2, 0, 4)
    NATIVE.rotate(states, angles, angles, "half_split").sum().backward()
    assert states.grad is not None
    assert states.grad.shape == states.shape


def test_weights_of_two_types_go_torchs_way() -> None:
    """Which then says what is wrong."""
    x, gate = torch.randn(9, HIDDEN), torch.randn(WIDTH, HIDDEN)
    with pytest.raises(RuntimeError, match="dtype"):
        NATIVE.swiglu(x, gate, gate.double(), torch.randn(HIDDEN, WIDTH), None)


def test_a_bias_of_another_type_goes_torchs_way() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        NATIVE.linear(torch.randn(9, HIDDEN), torch.randn(WIDTH, HIDDEN), torch.zeros(WIDTH).double())


def test_fake_tensors_have_shapes_alone() -> None:
    with FakeTensorMode():
        order, slots, counts = sort_by_expert(top_k(torch.randn(9, 3), 2), 3)
    assert (order.shape, slots.shape, counts.shape) == ((18,), (18,), (3,))


def test_sizes_are_checked_before_anything_is_written() -> None:
    states, gate, down = torch.randn(12, HIDDEN), torch.randn(3, WIDTH, HIDDEN), torch.randn(3, HIDDEN, WIDTH)
    counts, kept = torch.tensor(COUNTS), torch.empty(12, 2 * WIDTH)

    def forward(kept: Tensor, output: Tensor, counts: Tensor = counts) -> None:
        torch.ops.finemoe.experts_forward(
            states, None, None, counts, None, gate, gate, down, math.inf, kept, output
        )  # fmt: skip

    forward(kept, torch.empty(12, HIDDEN))
    with pytest.raises(RuntimeError, match="output must hold 240 numbers"):
        forward(kept, torch.empty(11, HIDDEN))
    with pytest.raises(RuntimeError, match="gate_up must hold 576 numbers"):
        forward(torch.empty(12, WIDTH), torch.empty(12, HIDDEN))
    with pytest.raises(RuntimeError, match="counts must not be negative"):
        forward(kept, torch.empty(12, HIDDEN), torch.tensor([13, -1, 0]))
    with pytest.raises(RuntimeError, match="laid out as these are"):
        torch.ops.finemoe.experts_backward(
            *(states, kept, states, None, None, counts, None, gate, gate, down, math.inf, None, None),
            *(torch.empty(3, 2 * WIDTH, HIDDEN)[:, :WIDTH], torch.empty_like(gate), torch.empty_like(down)),
        )


def test_no_rows_at_all() -> None:
    gate_up, down = torch.randn(3, 2 * WIDTH, HIDDEN, requires_grad=True), torch.randn(3, HIDDEN, WIDTH)
    output = native_experts(torch.empty(0, HIDDEN), None, None, torch.zeros(3).long(), None, gate_up, down, None)
    output.sum().backward()
    assert gate_up.grad is not None
    assert not gate_up.grad.any()
