"""dispatch sorts token copies by expert; combine brings expert outputs back and weighs them.

Both directions of both are gathers: a scatter-add over the hidden states is several times slower on a CPU, and its
order of additions would depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finemoe.model.moe.decision import RoutingDecision


@dataclass(frozen=True)
class Ticket:
    """How to find the way back. An assignment is a (token, choice) pair, numbered token · k + choice."""

    order: Tensor
    """[kept] the kept assignments, sorted by expert, then by token."""
    slots: Tensor
    """[tokens · k] where each assignment went in that order; a dropped one points at any row (its gate is 0)."""
    experts_per_token: int


def dispatch(hidden: Tensor, decision: RoutingDecision, keep: Tensor | None) -> tuple[Tensor, Tensor, Ticket]:
    """Copy each token once for each of its experts, experts in order.

    Args:
        hidden: [tokens, hidden].
        decision: who goes where.
        keep: [tokens, k] bool, False where capacity dropped the assignment; None when dropless.

    Returns:
        rows [kept, hidden] sorted by expert; counts [experts] of rows per expert; the ticket for `combine`.
    """
    k = decision.expert_ids.shape[1]
    num_experts = decision.scores.shape[1]
    flat = decision.expert_ids.reshape(-1)
    if keep is None:
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
    else:
        kept = keep.reshape(-1)
        # Dropped assignments sort behind the last expert and are cut off.
        order = torch.where(kept, flat, num_experts).argsort(stable=True)[: int(kept.sum())]
        counts = torch.bincount(flat[kept], minlength=num_experts)
    slots = torch.zeros_like(flat)
    slots[order] = torch.arange(len(order), device=flat.device)
    ticket = Ticket(order, slots, k)
    return _Spread.apply(hidden, ticket, keep), counts, ticket


def combine(rows: Tensor, ticket: Ticket, gate_weights: Tensor) -> Tensor:
    """Sum of gate times expert output for each token.

    Args:
        rows: [kept, hidden] expert outputs in dispatch order.
        ticket: from `dispatch`.
        gate_weights: [tokens, k]; 0 where dropped.

    Returns:
        [tokens, hidden].
    """
    if not len(rows):  # every assignment dropped
        return rows.new_zeros(len(gate_weights), rows.shape[1])
    gathered = _Return.apply(rows, ticket).view(-1, ticket.experts_per_token, rows.shape[1])
    return (gate_weights.to(rows.dtype)[:, None, :] @ gathered).squeeze(1)


class _Spread(torch.autograd.Function):
    """hidden -> rows; the gradient gathers each token's k rows and adds them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ticket: Ticket, keep: Tensor | None) -> Tensor:
        ctx.ticket, ctx.keep = ticket, keep
        return hidden.index_select(0, ticket.order // ticket.experts_per_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ticket: Ticket = ctx.ticket
        if not len(grad):
            return grad.new_zeros(len(ticket.slots) // ticket.experts_per_token, grad.shape[1]), None, None
        copies = grad.index_select(0, ticket.slots).view(-1, ticket.experts_per_token, grad.shape[1])
        if ctx.keep is not None:
            copies = copies * ctx.keep[:, :, None]
        return copies.sum(1), None, None


class _Return(torch.autograd.Function):
    """rows -> one row per assignment, by token. A dropped assignment reads some row, and its gate of 0 removes it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ticket: Ticket) -> Tensor:
        ctx.ticket = ticket
        return rows.index_select(0, ticket.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.ticket.order), None
