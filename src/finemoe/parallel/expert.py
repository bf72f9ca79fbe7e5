"""Expert parallelism: routed experts lie whole on different processes, and token states travel to them and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.moe.dispatch import LocalDispatch, Ticket
from finemoe.model.moe.experts import GroupedExperts, as_multiplied, run_experts


class _Exchange(torch.autograd.Function):
    """Rows to where they are wanted; their gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        sent, received = ctx.splits
        return _all_to_all(grad, received, sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    output = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output


@dataclass(frozen=True)
class _Travel:
    """The way there and back."""

    ticket: Ticket
    """Of the tokens that are here: experts of all processes."""
    sent: list[int]
    """[processes] rows that went to each."""
    received: list[int]
    """[processes] rows that came from each."""
    order: Tensor
    """[received rows] by expert, then by the process they came from."""


@dataclass(frozen=True)
class AllToAll:
    """Every process holds as many experts, in order; a row goes to the one that holds its expert, wherever that is.

    Splits are uneven and known from the tokens only: the counts travel first, and are read on the CPU once a layer, for
    which a device is waited for; kernels get them from there. Nothing else waits, but that where a capacity drops
    assignments, `LocalDispatch.in_place` asks how many are left.
    """

    group: Any
    """The processes that the experts of a layer are spread over."""
    processes: int

    def dispatch(self, hidden: Tensor, decision: RoutingDecision, keep: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """As in `model.moe.dispatch.Dispatch`; a process that gets no row still takes part."""
        here = LocalDispatch()
        rows, _, ticket = here.dispatch(hidden, decision, keep)
        counts = ticket.counts.view(self.processes, -1)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts.contiguous(), group=self.group)
        going, came = torch.stack((counts, coming)).tolist()
        sent, received = [sum(one) for one in going], [sum(one) for one in came]
        rows = _Exchange.apply(as_multiplied(rows), sent, received, self.group)  # half the bytes, and the same products
        experts = torch.arange(counts.shape[1], device=rows.device).repeat(self.processes)
        order = experts.repeat_interleave(coming.reshape(-1), output_size=sum(received)).argsort(stable=True)
        here_each = torch.tensor([sum(one) for one in zip(*came, strict=True)])
        return rows.index_select(0, order), here_each, _Travel(ticket, sent, received, order)

    def combine(self, rows: Tensor, ticket: _Travel, gate_weights: Tensor) -> Tensor:
        """Back to the order of arrival, home, and together."""
        back = torch.empty_like(ticket.order)
        back[ticket.order] = torch.arange(len(back), device=back.device)
        rows = _Exchange.apply(rows.index_select(0, back), ticket.received, ticket.sent, self.group)
        return LocalDispatch().combine(rows, ticket.ticket, gate_weights)

    def in_place(self, decision: RoutingDecision, keep: Tensor | None) -> Ticket | None:
        """Rows travel."""
        return None


class DistributedExperts(nn.Module):
    """The experts of a layer that lie here, under the names and the whole shapes of `GroupedExperts`."""

    def __init__(self, experts: GroupedExperts, mesh: DeviceMesh) -> None:
        """Keep this process's experts of `experts`; `mesh`: one dimension, the processes that share them."""
        super().__init__()
        self.gate_up_proj = nn.Parameter(_cut(experts.gate_up_proj, mesh))
        self.down_proj = nn.Parameter(_cut(experts.down_proj, mesh))
        self.backend, self.limit = experts.backend, experts.limit

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """As in `GroupedExperts.forward`, of the experts that are here."""
        gate_up, down = _here(self.gate_up_proj), _here(self.down_proj)
        return run_experts(self.backend, rows, counts, gate_up, down, self.limit)

    def fuses(self, hidden: Tensor, gate_weights: Tensor) -> bool:
        """Rows travel."""
        return False


def _cut(stack: Tensor, mesh: DeviceMesh) -> DTensor:
    """Some experts of a stack that is whole here, as a piece of it."""
    mine = torch.chunk(stack.detach(), mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)


def _here(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
