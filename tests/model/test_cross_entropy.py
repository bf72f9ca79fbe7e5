"""Chunked cross-entropy against F.cross_entropy on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finemoe.model import cross_entropy, native
from finemoe.model.backend import Backend
from finemoe.model.backends import NATIVE, TORCH

TOKENS, HIDDEN, VOCAB = 37, 8, 53


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head with gradients; targets; weights of which a third is 0."""
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    weights = torch.rand(TOKENS) * (torch.arange(TOKENS) % 3 > 0)
    return hidden, head, torch.randint(VOCAB, (TOKENS,)), weights


def oracle(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (weights * F.cross_entropy(hidden @ head.t(), targets, reduction="none")).sum()


@pytest.fixture(params=[TORCH, NATIVE], ids=["torch", "native"])
def path(request: pytest.FixtureRequest) -> Backend:
    """Both ways, where there is a compiler."""
    if request.param is NATIVE and not native.available():
        pytest.skip("no C++ compiler: plain torch runs")
    backend: Backend = request.param
    return backend


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * 0.7, tensors)  # a factor, as the trainer's division


@pytest.mark.parametrize("elements", [1, VOCAB - 1, VOCAB, 5 * VOCAB + 3, 1 << 20])
def test_value_and_gradients_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": elements})
    hidden, head, targets, weights = inputs()
    ours = TORCH.cross_entropy_sum(hidden, head, targets, weights)
    theirs = oracle(hidden, head, targets, weights)
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), strict=True):
        torch.testing.assert_close(mine, expected)


def test_gradients_by_finite_differences(path: Backend) -> None:
    hidden, head, targets, weights = inputs()
    loss = path.cross_entropy_sum(hidden, head, targets, weights)
    (gradient,) = torch.autograd.grad(loss, hidden)
    direction = torch.randn_like(hidden)
    with torch.no_grad():
        steps = [oracle(hidden.double() + h * direction, head.double(), targets, weights) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(
        (gradient * direction).sum(), ((steps[0] - steps[1]) / 2e-5).float(), rtol=1e-3, atol=1e-4
    )


def test_tokens_of_weight_zero_do_not_matter(path: Backend) -> None:
    hidden, head, targets, weights = inputs()
    (gradient,) = torch.autograd.grad(path.cross_entropy_sum(hidden, head, targets, weights), hidden)
    assert not gradient[weights == 0].any()
    changed = torch.where((weights == 0)[:, None], hidden + 5, hidden)
    before = path.cross_entropy_sum(hidden, head, targets, weights)
    assert torch.equal(path.cross_entropy_sum(changed, head, targets, weights), before)


def test_large_logits_do_not_overflow(path: Backend) -> None:
    hidden, head, targets, weights = inputs()
    loss = path.cross_entropy_sum(hidden * 1000, head, targets, weights)
    torch.testing.assert_close(loss, oracle(hidden * 1000, head, targets, weights))


def test_bf16_autocast_is_near_and_accumulates_in_float32() -> None:
    hidden, head, targets, weights = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = NATIVE.cross_entropy_sum(hidden, head, targets, weights)
    theirs = oracle(hidden, head, targets, weights)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)
    for mine, expected in zip(gradients(ours, hidden, head), gradients(theirs, hidden, head), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, expected, rtol=5e-2, atol=2e-2)


def test_without_gradients_the_same_value_and_no_gradient_work(path: Backend) -> None:
    hidden, head, targets, weights = inputs()
    with torch.no_grad(), LargestTensor() as seen:
        loss = path.cross_entropy_sum(hidden, head, targets, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, oracle(hidden, head, targets, weights))
    assert not {"aten.addmm_.default", "aten.scatter_add_.default"} & seen.operations


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_be_frozen(frozen: int, path: Backend) -> None:
    tensors = list(inputs())
    tensors[frozen] = tensors[frozen].detach()
    trained = tensors[1 - frozen]
    ours = path.cross_entropy_sum(*tensors)
    torch.testing.assert_close(gradients(ours, trained), gradients(oracle(*tensors), trained))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocab, chunk = 512, 1000, 16
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", {"cpu": chunk * vocab})
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    targets, weights = torch.randint(vocab, (tokens,)), torch.ones(tokens)
    with LargestTensor() as seen:
        TORCH.cross_entropy_sum(hidden, head, targets, weights).backward()
    assert seen.elements == chunk * vocab
    with LargestTensor() as whole:
        oracle(hidden, head, targets, weights)
    assert whole.elements == tokens * vocab  # the measure sees what it should


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")
@pytest.mark.parametrize(("tokens", "vocab"), [(0, 10), (1, 1), (3, 15), (130, 140_001)])
def test_native_chunks(tokens: int, vocab: int) -> None:
    hidden = torch.randn(tokens, 4, requires_grad=True)
    head = torch.randn(vocab, 4, requires_grad=True)
    targets, weights = torch.randint(vocab, (tokens,)), torch.rand(tokens)
    ours, theirs = NATIVE.cross_entropy_sum(hidden, head, targets, weights), oracle(hidden, head, targets, weights)
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    exact = oracle(exact_hidden, exact_head, targets, weights.double())
    found = (ours, *gradients(ours, hidden, head))
    plain = (theirs, *gradients(theirs, hidden, head))
    for mine, torchs, truth in zip(found, plain, (exact, *gradients(exact, exact_hidden, exact_head)), strict=True):
        scale = truth.abs().max().item() if truth.numel() else 0.0
        error, allowed = ((x.double() - truth).abs().sum().item() for x in (mine, torchs))
        assert error <= 2 * allowed + 1e-6 * scale * max(1, truth.numel())


@pytest.mark.skipif(not native.available(), reason="no C++ compiler: plain torch runs")
@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_a_target_outside_the_vocabulary_is_an_error(wrong: int) -> None:
    hidden, head, targets, weights = inputs()
    targets[5] = wrong
    with pytest.raises(RuntimeError, match=f"target {wrong} is outside the vocabulary of {VOCAB}"):
        NATIVE.cross_entropy_sum(hidden, head, targets, weights)
