"""How far a student's next-token distributions are from a teacher's, in chunks: [tokens, vocab] is never in memory.

As in `cross_entropy`, the gradient is computed in the forward pass, while a chunk's logits are still there; the
backward pass only scales it. The teacher gets none.

With p the teacher's distribution, q the student's and z the student's logits, both softmaxes at one temperature T:

    forward  KL(p || q) = sum p (log p - log q),   its gradient by z:  (q - p) / T
    reverse  KL(q || p) = sum q (log q - log p),   its gradient by z:  q (log q - log p - KL) / T
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Direction = Literal["forward", "reverse"]

_CHUNK_ELEMENTS = {"cpu": 1 << 18}
"""Logits of one of the two models that a chunk holds, by device: half of what cross-entropy, which has one, takes."""
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass(frozen=True)
class WholeTeacher:
    """A teacher that is at hand: its whole distribution is computed, a chunk of tokens at a time."""

    hidden: Tensor
    """[tokens, width of the teacher]: states of its last norm."""
    head: Tensor
    """[vocab, width of the teacher]."""


@dataclass(frozen=True)
class BestOfTeacher:
    """What was kept of a teacher's distributions: the most probable ids; all others are one bucket."""

    ids: Tensor
    """[tokens, k] int64, the most probable first, none twice; k is less than the vocabulary."""
    logprobs: Tensor
    """[tokens, k] in nats, at the temperature at which they are compared."""


@dataclass(frozen=True)
class Divergence:
    """What came of comparing them."""

    total: Tensor
    """Scalar, nats: the sum over tokens of weight · divergence; differentiable."""
    agreed: Tensor
    """Scalar: the sum of the weights of the tokens where both hold the same id for the most probable."""


def divergence_sum(
    hidden: Tensor,
    head: Tensor,
    teacher: WholeTeacher | BestOfTeacher,
    weights: Tensor,
    direction: Direction = "forward",
    temperature: float = 1.0,
    vocab: int | None = None,
) -> Divergence:
    """The divergence of the student from the teacher, summed over tokens, in float32 or the wider type of its inputs.

    Args:
        hidden: [tokens, width] of the student.
        head: [rows, width] of the student; the vocabulary is the teacher's, and rows behind it are padding.
        teacher: what it says of the same tokens.
        weights: [tokens] float; 0 leaves a token out.
        direction: forward: KL(teacher || student); reverse: KL(student || teacher).
        temperature: both models' logits are divided by it; what `BestOfTeacher` holds, was before.
        vocab: ids that the teacher knows; None: all rows of `head`. What the student gives its padding is not compared
            but counts -log(1 - its sum), which the forward divergence comes to by itself.

    Raises:
        ValueError: reverse, and the teacher is its best ids alone: of the others, which the student may like, nothing
            is known of each.
    """
    if isinstance(teacher, BestOfTeacher):
        if direction == "reverse":
            raise ValueError("the reverse divergence needs the whole distribution of the teacher")
        first, second = teacher.ids, teacher.logprobs
    else:
        first, second = teacher.hidden.detach(), teacher.head.detach()
    # Decided out here: within a Function's forward, gradients are off and no_grad does not show.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    kind = "best" if isinstance(teacher, BestOfTeacher) else direction
    total, agreed = _ChunkedDivergence.apply(
        hidden, head, first, second, weights, kind, temperature, vocab or len(head), wants_gradient
    )
    return Divergence(total, agreed)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        first: Tensor,
        second: Tensor,
        weights: Tensor,
        kind: str,
        temperature: float,
        vocab: int,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.head_dtype, cast_head = head.dtype, head
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, cast_head = hidden.to(dtype), head.to(dtype)
            if kind != "best":
                first, second = first.to(dtype), second.to(dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(wide)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        # Accumulated in float32: hundreds of small chunks in bf16 would lose the smallest contributions.
        grad_head = torch.zeros_like(head, dtype=wide) if wants_gradient else None
        total, agreed = (torch.zeros((), dtype=wide, device=hidden.device) for _ in range(2))
        chunk = max(1, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS_ELSEWHERE) // head.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                logits = (hidden[part] @ cast_head.t()).to(wide)
                theirs = second[part].to(wide) if kind == "best" else (first[part] @ second.t()).to(wide)
                best = first[part, 0] if kind == "best" else theirs.argmax(dim=-1)
                agreed += (weights[part] * (logits[:, :vocab].argmax(dim=-1) == best)).sum()
                logits.div_(temperature)
                logprobs = logits[:, :vocab].log_softmax(dim=-1)
                if kind == "best":
                    values, gradient = _of_best(logprobs, first[part], theirs)
                else:
                    values, gradient = _OF[kind](logprobs, theirs.div_(temperature).log_softmax(dim=-1))
                if vocab < logits.shape[1]:
                    values, gradient = _with_padding(logits, vocab, values, gradient)
                total += (weights[part] * values).sum()
                if grad_hidden is not None and grad_head is not None:
                    scores = gradient.mul_((weights[part] / temperature)[:, None]).to(hidden.dtype)
                    torch.mm(scores, cast_head, out=grad_hidden[part])
                    grad_head += scores.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(agreed)
        return total, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype)
        return *scaled, None, None, None, None, None, None, None


def _forward(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) `[tokens]` of log-probabilities `[tokens, vocab]`, and its gradient by T · logits."""
    teacher = theirs.exp()
    values = (teacher * theirs.sub_(ours)).sum(dim=-1)
    return values, ours.exp_().sub_(teacher)


def _reverse(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), and the same."""
    student, apart = ours.exp(), ours.sub_(theirs)
    values = (student * apart).sum(dim=-1)
    return values, student.mul_(apart.sub_(values[:, None]))


_OF = {"forward": _forward, "reverse": _reverse}


def _of_best(ours: Tensor, ids: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the ids that were kept and one bucket with all others, and the same.

    With P and Q what teacher and student give the bucket, the gradient of each id in it is  q - P (q / Q),  as if the
    teacher had divided its part as the student does; of the ids that were kept it is  q - p,  as always.
    """
    kept, chosen = theirs.exp(), ours.gather(1, ids)
    rest = (-torch.expm1(theirs.logsumexp(dim=-1))).clamp_(min=0)  # rounding may leave less than nothing
    others = ours.scatter(1, ids, float("-inf"))
    student_rest = others.logsumexp(dim=-1)
    bucket = torch.where(rest > 0, rest * (rest.log() - student_rest), rest)
    values = (kept * (theirs - chosen)).sum(dim=-1) + bucket
    divided = others.sub_(student_rest[:, None]).exp_().mul_(rest[:, None])
    return values, ours.exp_().sub_(divided).scatter_add_(1, ids, -kept)


def _with_padding(logits: Tensor, vocab: int, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient `[tokens, rows]` with -log of the probability that all ids before `vocab` have together."""
    both, known = logits.softmax(dim=-1), logits[:, :vocab].softmax(dim=-1)
    mass = logits.logsumexp(dim=-1) - logits[:, :vocab].logsumexp(dim=-1)
    both[:, :vocab] += gradient - known
    return values + mass, both
