"""dispatch sorts token copies by expert; combine brings expert outputs back and weighs them.

Here both directions of both are gathers: a scatter-add over the hidden states is several times slower on a CPU, and its
order of additions would depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.native.exact import sort_by_expert


@dataclass(frozen=True)
class Ticket:
    """The way there and back. An assignment is a (token, choice) pair, numbered token · k + choice."""

    order: Tensor
    """[kept] the kept assignments, sorted by expert, then by token."""
    slots: Tensor
    """[tokens · k] where each assignment went in that order; -1 where it was dropped."""
    counts: Tensor
    """[experts] kept assignments of each expert."""
    experts_per_token: int
    complete: bool
    """Nothing was dropped."""


class Dispatch(Protocol):
    """How token states reach their experts, and how outputs come back. A layer holds one and does not ask which."""

    def dispatch(self, hidden: Tensor, decision: RoutingDecision, keep: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Copy each token once for each of its experts, experts in order.

        Args:
            hidden: [tokens, hidden].
            decision: who goes where.
            keep: [tokens, k] bool, False where capacity dropped the assignment; None when dropless.

        Returns:
            rows [rows, hidden] for the experts that the layer holds, sorted by expert; counts [experts] of rows of
            each, on the CPU where they were read there anyway; the ticket for `combine`, which means nothing to anybody
            else.
        """

    def combine(self, rows: Tensor, ticket: Any, gate_weights: Tensor) -> Tensor:
        """Sum of gate times expert output for each token, with a graph even where there is no row.

        Args:
            rows: [rows, hidden] expert outputs in the order of `dispatch`.
            ticket: from `dispatch`.
            gate_weights: [tokens, k]; 0 where dropped.

        Returns:
            [tokens, hidden].
        """

    def in_place(self, decision: RoutingDecision, keep: Tensor | None) -> Ticket | None:
        """What a kernel needs that reads token states where they lie, weighs and adds; None where rows must travel."""


@dataclass(frozen=True)
class LocalDispatch:
    """Every expert is here."""

    def dispatch(self, hidden: Tensor, decision: RoutingDecision, keep: Tensor | None) -> tuple[Tensor, Tensor, Ticket]:
        """One gather of the rows."""
        ticket = self.in_place(decision, keep)
        rows: Tensor = _Spread.apply(hidden, ticket)
        return rows, ticket.counts, ticket

    def combine(self, rows: Tensor, ticket: Ticket, gate_weights: Tensor) -> Tensor:
        """One gather back, and a small product for each token."""
        gathered = _Return.apply(rows, ticket).view(len(gate_weights), ticket.experts_per_token, rows.shape[1])
        return (gate_weights.to(rows.dtype)[:, None, :] @ gathered).squeeze(1)

    def in_place(self, decision: RoutingDecision, keep: Tensor | None) -> Ticket:
        """Assignments sorted by expert."""
        k, num_experts = decision.expert_ids.shape[1], decision.scores.shape[1]
        if keep is None:
            return Ticket(*sort_by_expert(decision.expert_ids, num_experts), k, complete=True)
        flat, kept = decision.expert_ids.reshape(-1), keep.reshape(-1)
        # Dropped assignments sort behind the last expert and are cut off.
        order = torch.where(kept, flat, num_experts).argsort(stable=True)[: int(kept.sum())]
        slots = torch.full_like(flat, -1)
        slots[order] = torch.arange(len(order), device=flat.device)
        return Ticket(order, slots, torch.bincount(flat[kept], minlength=num_experts), k, complete=False)


class _Spread(torch.autograd.Function):
    """hidden -> rows; the gradient gathers each token's k rows and adds them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ticket: Ticket) -> Tensor:
        ctx.ticket = ticket
        return hidden.index_select(0, ticket.order // ticket.experts_per_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ticket: Ticket = ctx.ticket
        copies = _by_assignment(grad, ticket)
        if not ticket.complete:
            copies = copies * (ticket.slots >= 0)[:, None]
        shape = (len(ticket.slots) // ticket.experts_per_token, ticket.experts_per_token, grad.shape[1])
        return copies.view(shape).sum(1), None


class _Return(torch.autograd.Function):
    """rows -> one row per assignment, by token. A dropped assignment reads some row, and its gate of 0 removes it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ticket: Ticket) -> Tensor:
        ctx.ticket = ticket
        return _by_assignment(rows, ticket)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.ticket.order), None


def _by_assignment(rows: Tensor, ticket: Ticket) -> Tensor:
    """[tokens · k, hidden]: the row of each assignment, any row for a dropped one, zeros where there is none at all."""
    if not len(rows):
        return rows.new_zeros(len(ticket.slots), rows.shape[1])
    return rows.index_select(0, ticket.slots if ticket.complete else ticket.slots.clamp(min=0))
