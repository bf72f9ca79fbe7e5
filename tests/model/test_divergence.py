"""The chunked divergence against autograd of the plain formula on whole logits."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finemoe.model import divergence
from finemoe.model.divergence import BestOfTeacher, WholeTeacher, divergence_sum

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 37, 8, 5, 53
Kind = Literal["forward", "reverse", "best"]
KINDS: tuple[Kind, ...] = ("forward", "reverse", "best")


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True)


def teacher_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, TEACHER_WIDTH, dtype=dtype), torch.randn(VOCAB, TEACHER_WIDTH, dtype=dtype)


def some_weights() -> Tensor:
    """A third of them is 0."""
    return torch.rand(TOKENS, dtype=torch.float64) * (torch.arange(TOKENS) % 3 > 0)


def best_of(hidden: Tensor, head: Tensor, k: int, temperature: float) -> BestOfTeacher:
    logprobs, ids = (hidden @ head.t() / temperature).log_softmax(-1).topk(k)
    return BestOfTeacher(ids, logprobs)


def whole_formula(
    hidden: Tensor, head: Tensor, states: tuple[Tensor, Tensor], weights: Tensor, kind: Kind, temperature: float, k: int
) -> Tensor:
    """Written as the papers have it, with all logits at once; autograd does the rest."""
    q = (hidden @ head.t() / temperature).softmax(-1)
    p = (states[0] @ states[1].t() / temperature).softmax(-1)
    if kind == "reverse":
        return (weights[:, None] * q * (q.log() - p.log())).sum()
    if kind == "best":
        buckets = []
        ids = p.topk(k).indices
        for one in (p, q):
            kept = one.gather(1, ids)
            buckets.append(torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), dim=-1))
        p, q = buckets
    return (weights[:, None] * p * (p.log() - q.log())).sum()


def ours(
    hidden: Tensor, head: Tensor, states: tuple[Tensor, Tensor], weights: Tensor, kind: Kind, temperature: float, k: int
) -> Tensor:
    if kind == "best":
        return divergence_sum(hidden, head, best_of(*states, k, temperature), weights, "forward", temperature).total
    return divergence_sum(hidden, head, WholeTeacher(*states), weights, kind, temperature).total


def close(mine: Tensor, expected: Tensor, within: float = 1e-8) -> None:
    torch.testing.assert_close(mine, expected, rtol=within, atol=within)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("elements", [1, VOCAB - 1, VOCAB, 5 * VOCAB + 3, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, elements: int, temperature: float
) -> None:
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", {"cpu": elements})
    (hidden, head), states, weights = student(), teacher_states(), some_weights()
    mine = ours(hidden, head, states, weights, kind, temperature, 4)
    expected = whole_formula(hidden, head, states, weights, kind, temperature, 4)
    assert mine.dtype == torch.float64
    close(mine, expected)
    assert expected > 0.1
    found = torch.autograd.grad(mine * 0.7, (hidden, head))  # a factor, as the trainer's division
    for one, other in zip(found, torch.autograd.grad(expected * 0.7, (hidden, head)), strict=True):
        close(one, other)


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_student_gives_its_padding(monkeypatch: pytest.MonkeyPatch, kind: Kind, elements: int) -> None:
    """Forward, it is the divergence over all rows, of which the teacher gives the padding nothing."""
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", {"cpu": elements})
    (hidden, known), states, weights = student(), teacher_states(), some_weights()
    padding = torch.randn(9, WIDTH, dtype=torch.float64)
    head = torch.cat((known.detach(), padding)).requires_grad_()
    teacher = best_of(*states, 4, 2.0) if kind == "best" else WholeTeacher(*states)
    found = divergence_sum(hidden, head, teacher, weights, "reverse" if kind == "reverse" else "forward", 2.0, VOCAB)
    q = (hidden @ head.t() / 2.0).log_softmax(-1)
    inside = q[:, :VOCAB].exp().sum(-1)
    expected = whole_formula(hidden, head[:VOCAB], states, weights, kind, 2.0, 4) - (weights * inside.log()).sum()
    if kind == "forward":
        p = (states[0] @ states[1].t() / 2.0).softmax(-1)
        close((weights[:, None] * p * (p.log() - q[:, :VOCAB])).sum(), expected)
    close(found.total, expected)
    close(found.agreed, divergence_sum(hidden, known, teacher, weights, temperature=2.0).agreed)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (found.total, expected)), strict=True):
        close(one, other)


@pytest.mark.parametrize("k", [1, VOCAB - 1])
def test_one_id_or_all_but_one(k: int) -> None:
    (hidden, head), states, weights = student(), teacher_states(), some_weights()
    mine, expected = (f(hidden, head, states, weights, "best", 1.0, k) for f in (ours, whole_formula))
    close(mine, expected)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (mine, expected)), strict=True):
        close(one, other)


def test_a_bucket_that_is_empty_counts_nothing() -> None:
    """What is left of a teacher that is sure is nothing, or less by a rounding."""
    hidden, head = student()
    sure = BestOfTeacher(torch.tensor([[3, 5]] * TOKENS), torch.tensor([[1e-9, -80.0]] * TOKENS, dtype=torch.float64))
    total = divergence_sum(hidden, head, sure, torch.ones(TOKENS)).total
    close(total, -(hidden @ head.t()).log_softmax(-1)[:, 3].sum(), 1e-6)
    assert all(one.isfinite().all() for one in torch.autograd.grad(total, (hidden, head)))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_weight_zero_do_not_matter(kind: Kind) -> None:
    (hidden, head), states, weights = student(), teacher_states(), some_weights()
    before = ours(hidden, head, states, weights, kind, 1.0, 4)
    (gradient,) = torch.autograd.grad(before, hidden)
    assert not gradient[weights == 0].any()
    assert gradient[weights > 0].any()
    changed = torch.where((weights == 0)[:, None], hidden + 5, hidden)
    assert torch.equal(ours(changed, head, states, weights, kind, 1.0, 4), before)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_of_two_that_are_the_same_it_is_nothing_to_the_bit(kind: Literal["forward", "reverse"]) -> None:
    hidden, head = student(torch.float32)
    found = divergence_sum(hidden, head, WholeTeacher(hidden, head), torch.ones(TOKENS), kind)
    assert found.total == 0
    assert found.agreed == TOKENS
    assert all(not one.any() for one in torch.autograd.grad(found.total, (hidden, head)))


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head = student()
    states = [one.requires_grad_() for one in teacher_states()]
    total = divergence_sum(hidden, head, WholeTeacher(*states), some_weights()).total
    assert torch.autograd.grad(total, states, allow_unused=True) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_how_often_both_hold_the_same_for_best(kind: Kind) -> None:
    (hidden, head), weights = student(), some_weights()
    states = (hidden + torch.randn_like(hidden)).detach(), head.detach()
    same = (hidden @ head.t()).argmax(-1) == (states[0] @ states[1].t()).argmax(-1)
    assert 0 < weights[same].sum() < weights.sum()
    teacher = best_of(*states, 2, 1.0) if kind == "best" else WholeTeacher(*states)
    found = divergence_sum(hidden, head, teacher, weights, "forward" if kind == "best" else kind)
    close(found.agreed, weights[same].sum())
    assert not found.agreed.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_be_frozen(frozen: int) -> None:
    tensors, states, weights = list(student()), teacher_states(), some_weights()
    tensors[frozen] = tensors[frozen].detach()
    trained = tensors[1 - frozen]
    (mine,), (expected,) = (
        torch.autograd.grad(f(tensors[0], tensors[1], states, weights, "reverse", 1.0, 4), trained)
        for f in (ours, whole_formula)
    )
    close(mine, expected)


def test_without_gradients_the_same_value() -> None:
    (hidden, head), states, weights = student(), teacher_states(), some_weights()
    with torch.no_grad():
        loss = ours(hidden, head, states, weights, "forward", 1.0, 4)
    assert not loss.requires_grad
    close(loss, whole_formula(hidden, head, states, weights, "forward", 1.0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_is_near_and_accumulates_in_float32(kind: Kind) -> None:
    exact, weights = student(torch.float32), some_weights().float()
    states = teacher_states(torch.float32)
    teacher = best_of(*states, 4, 1.0) if kind == "best" else WholeTeacher(*states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = divergence_sum(*exact, teacher, weights, "reverse" if kind == "reverse" else "forward").total
    expected = whole_formula(*exact, states, weights, kind, 1.0, 4)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, expected, rtol=2e-2, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, exact) for loss in (mine, expected)), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=5e-2, atol=6e-2)


def test_large_logits_do_not_overflow() -> None:
    (hidden, head), states, weights = student(), teacher_states(), some_weights()
    for kind in KINDS:
        loss = ours(hidden * 1000, head, states, weights, kind, 1.0, 4)
        assert loss.isfinite()
        assert all(one.isfinite().all() for one in torch.autograd.grad(loss, (hidden, head)))


def test_the_best_alone_say_nothing_of_the_reverse() -> None:
    (hidden, head), states = student(), teacher_states()
    with pytest.raises(ValueError, match="whole distribution"):
        divergence_sum(hidden, head, best_of(*states, 4, 1.0), some_weights(), "reverse")


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    tokens, vocab, chunk = 512, 1000, 16
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", {"cpu": chunk * vocab})
    hidden, head = (torch.randn(n, 4, requires_grad=True) for n in (tokens, vocab))
    teacher: WholeTeacher | BestOfTeacher = WholeTeacher(torch.randn(tokens, 3), torch.randn(vocab, 3))
    if kind == "best":
        teacher = BestOfTeacher(torch.tensor([[1, 2]] * tokens), torch.tensor([[-1.0, -2.0]] * tokens))
    with LargestTensor() as seen:
        divergence_sum(hidden, head, teacher, torch.ones(tokens), "reverse" if kind == "reverse" else "forward")
    assert seen.elements == chunk * vocab
