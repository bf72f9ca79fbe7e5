"""Dispatch, expert kernels, combine and capacity, each against its loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from finemoe.model.backends import EXPERT_KERNELS, backend_for
from finemoe.model.config import Kernels
from finemoe.model.moe.capacity import kept_assignments
from finemoe.model.moe.dispatch import LocalDispatch, _Return, _Spread
from finemoe.model.moe.experts import GroupedExperts, sorted_slices
from oracles import moe
from oracles.models import decision_of

IDS = torch.tensor([[0, 2], [2, 0], [4, 1], [2, 4], [1, 2]])  # 5 experts; expert 3 is never chosen
LOCAL = LocalDispatch()
KEEPS = {
    "dropless": None,
    "some dropped": torch.tensor([[True, False], [True, True], [False, False], [True, True], [False, True]]),
    "all dropped": torch.zeros(5, 2, dtype=torch.bool),
}


def weights(num_experts: int, hidden: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(num_experts, 2 * width, hidden, dtype=torch.float64, requires_grad=True)
    return gate_up, torch.randn(num_experts, hidden, width, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_dispatch_hands_each_expert_its_tokens_in_order(keep: Tensor | None) -> None:
    hidden = torch.randn(5, 3)
    rows, counts, _ = LOCAL.dispatch(hidden, decision_of(IDS, 5), keep)
    expected = moe.dispatched(hidden, IDS, 5, keep)
    assert counts.tolist() == [len(inbox) for inbox in expected]
    assert torch.equal(rows, torch.cat(expected))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_dispatch_experts_combine_as_token_by_token(keep: Tensor | None, kernel: str) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    stacked = weights(5)
    masked = gates if keep is None else gates * keep
    rows, counts, ticket = LOCAL.dispatch(hidden, decision_of(IDS, 5), keep)
    output = LOCAL.combine(EXPERT_KERNELS[kernel](rows, counts, *stacked), ticket, masked)
    inboxes = moe.dispatched(hidden, IDS, 5, keep)
    outbox = [moe.swiglu(x, *w) for x, w in zip(inboxes, moe.unstack(*stacked), strict=True)]
    expected = moe.combined(outbox, IDS, gates, keep, size=3)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    leaves, direction = (hidden, gates, *stacked), torch.randn_like(output)
    found = torch.autograd.grad((output * direction).sum(), leaves)
    if keep is not None and not keep.any():
        assert all(
            gradient.shape == leaf.shape and not gradient.any() for gradient, leaf in zip(found, leaves, strict=True)
        )
        return
    torch.testing.assert_close(found, torch.autograd.grad((expected * direction).sum(), leaves), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_gradcheck_of_dispatch_and_combine(keep: Tensor | None) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(hidden: Tensor, gates: Tensor) -> Tensor:
        rows, _, ticket = LOCAL.dispatch(hidden, decision_of(IDS, 5), keep)
        return LOCAL.combine(rows.square(), ticket, gates if keep is None else gates * keep)

    assert gradcheck(there_and_back, (hidden, gates))


def test_gradcheck_of_spread_and_return() -> None:
    ticket = LOCAL.in_place(decision_of(IDS, 5), None)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: _Spread.apply(x, ticket), (hidden,))
    assert gradcheck(lambda x: _Return.apply(x, ticket), (rows,))


@pytest.mark.parametrize("counts", [[2, 1, 3], [0, 6, 0], [0, 0, 1], [6, 0, 0]])
def test_gradcheck_of_sorted_slices(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *inputs: sorted_slices(inputs[0], torch.tensor(counts), *inputs[1:]), (rows, *weights(3)))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_kernel_without_any_row(kernel: str) -> None:
    rows, stacked = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True), weights(3)
    output = EXPERT_KERNELS[kernel](rows, torch.zeros(3, dtype=torch.int64), *stacked)
    output.sum().backward()
    assert output.shape == (0, 3)
    assert all(weight.grad is not None and not weight.grad.any() for weight in stacked)
    assert rows.grad is not None


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_gradient_of_an_expert_without_tokens_is_exactly_zero(kernel: str) -> None:
    # The hand-written backward fills uninitialised memory; an expert it skipped would keep garbage.
    stacked = weights(4)
    rows = torch.randn(5, 3, dtype=torch.float64)
    EXPERT_KERNELS[kernel](rows, torch.tensor([0, 3, 0, 2]), *stacked).sum().backward()
    for weight in stacked:
        assert not weight.grad[0].any()
        assert not weight.grad[2].any()
        assert weight.grad[1].any()


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_kernel_gradients_when_one_input_is_frozen(kernel: str, frozen: int) -> None:
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True), *weights(2)]
    counts = torch.tensor([2, 3])
    full = torch.autograd.grad(EXPERT_KERNELS[kernel](inputs[0], counts, *inputs[1:]).sum(), inputs)
    left = [i for i in range(3) if i != frozen]
    inputs[frozen] = inputs[frozen].detach()
    part = torch.autograd.grad(EXPERT_KERNELS[kernel](inputs[0], counts, *inputs[1:]).sum(), [inputs[i] for i in left])
    torch.testing.assert_close(part, tuple(full[i] for i in left))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_experts_follow_autocast_and_keep_float32_gradients(kernel: str) -> None:
    experts = GroupedExperts(2, 3, 4, backend_for(Kernels.model_validate({"experts": kernel})))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(torch.randn(5, 3), torch.tensor([2, 3]))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in experts.parameters())


@pytest.mark.parametrize("factor", [0.01, 0.25, 0.5, 1.0, 1.25, 100.0])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (12, 1, 4), (12, 3, 5), (7, 2, 2), (40, 2, 16)])
def test_capacity_serves_first_choices_first(tokens: int, k: int, experts: int, factor: float) -> None:
    skewed = torch.rand(tokens, experts) + torch.arange(experts) / experts
    expert_ids = skewed.topk(k, dim=-1).indices
    assert torch.equal(kept_assignments(expert_ids, experts, factor), moe.kept(expert_ids, experts, factor))


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "expected"),
    [(200, 4, 1.1, 55), (6000, 4, 1.1, 1650), (512, 8, 1.25, 80), (4096, 64, 1.2, 77)],
)
def test_capacity_is_not_one_too_large_by_rounding(tokens: int, experts: int, factor: float, expected: int) -> None:
    # 200 / 4 * 1.1 is 55.00000000000001 in floating point, and its ceiling 56.
    everyone_on_expert_0 = torch.zeros(tokens, 1, dtype=torch.int64)
    assert kept_assignments(everyone_on_expert_0, experts, factor).sum() == expected
