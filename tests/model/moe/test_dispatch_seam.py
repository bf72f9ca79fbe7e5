"""The seam that expert parallelism needs: a layer whose experts lie on two ranks, played by two threads.

Each rank has its own tokens and half of the experts; rows are exchanged by copying. Nothing in the layer knows of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.backends import EXPERT_KERNELS
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision, RoutingRecord
from finemoe.model.moe.dispatch import Ticket
from finemoe.model.moe.experts import GroupedExperts
from finemoe.model.moe.layer import MoELayer
from oracles.models import VOCAB, moe_layer, moe_table

EXPERTS, HALF, HIDDEN = 6, 3, 16


class Mail:
    """What two ranks send each other; whoever waits for ever fails instead."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.box: dict[tuple[int, int], Any] = {}

    def exchange(self, rank: int, parcels: list[Any]) -> list[Any]:
        """Parcel i goes to rank i; what came from each rank is returned."""
        self.barrier.wait()
        for receiver, parcel in enumerate(parcels):
            self.box[rank, receiver] = parcel
        self.barrier.wait()
        return [self.box[sender, rank] for sender in range(2)]


@dataclass
class TwoRanks:
    """Assignment by assignment, without any of the arithmetic of the local dispatch."""

    rank: int
    mail: Mail

    def dispatch(self, hidden: Tensor, decision: RoutingDecision, keep: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """Rows go to the rank of their expert, one parcel an expert."""
        tokens, k = decision.expert_ids.shape
        ids = decision.expert_ids.flatten().tolist()
        kept = [True] * len(ids) if keep is None else keep.flatten().tolist()
        mine = [[a for a in range(tokens * k) if ids[a] == expert and kept[a]] for expert in range(EXPERTS)]
        parcels = [hidden[torch.tensor([a // k for a in assignments], dtype=torch.int64)] for assignments in mine]
        came = self.mail.exchange(self.rank, [parcels[:HALF], parcels[HALF:]])
        by_expert = [torch.cat((came[0][expert], came[1][expert])) for expert in range(HALF)]
        sizes = [[len(came[sender][expert]) for sender in range(2)] for expert in range(HALF)]
        return torch.cat(by_expert), torch.tensor([len(rows) for rows in by_expert]), (mine, sizes)

    def combine(self, rows: Tensor, ticket: Any, gate_weights: Tensor) -> Tensor:
        """Parcels go back, and every row to its assignment."""
        mine, sizes = ticket
        parts = [piece.split(size) for piece, size in zip(rows.split([sum(s) for s in sizes]), sizes, strict=True)]
        came = self.mail.exchange(self.rank, [[part[sender] for part in parts] for sender in range(2)])
        places = torch.tensor([a for assignments in mine for a in assignments], dtype=torch.int64)
        outputs = rows.new_zeros(gate_weights.numel(), rows.shape[1]).index_add(
            0, places, torch.cat((*came[0], *came[1]))
        )
        return (gate_weights.reshape(-1, 1).to(rows.dtype) * outputs).view(*gate_weights.shape, rows.shape[1]).sum(1)

    def in_place(self, decision: RoutingDecision, keep: Tensor | None) -> Ticket | None:
        """Rows travel."""


def shard(layer: MoELayer, rank: int, mail: Mail) -> MoELayer:
    """The layer as that rank has it: its half of the experts, the rest shared."""
    found = MoELayer(layer.config, HIDDEN, VOCAB, layer.experts.backend)
    found.router, found.shared_experts = layer.router, layer.shared_experts
    found.experts = GroupedExperts(HALF, HIDDEN, layer.config.expert_hidden_size, layer.experts.backend)
    for name, parameter in layer.experts.named_parameters():
        delattr(found.experts, name)  # a view takes the parameter's place, so that gradients arrive in the whole layer
        setattr(found.experts, name, parameter[rank * HALF : (rank + 1) * HALF])
    found.dispatch = TwoRanks(rank, mail)
    return found


TOKENS = {"even": (5, 5), "uneven": (2, 9), "none on one rank": (0, 6), "none on the other": (7, 0)}
Result = tuple[Tensor, RoutingRecord]


def on_ranks(run: Callable[[int], Result]) -> list[Result]:
    """Both at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


def compare(layer: MoELayer, lengths: tuple[int, int], allowed: Tensor | None, **close: float) -> None:
    dtype = layer.experts.gate_up_proj.dtype
    hidden = [torch.randn(1, length, HIDDEN, dtype=dtype, requires_grad=True) for length in lengths]
    tokens = [torch.randint(VOCAB, (1, length)) for length in lengths]
    directions = [torch.randn_like(states) for states in hidden]
    constraint = None if allowed is None else RoutingConstraint(allowed=allowed)
    leaves = {"hidden 0": hidden[0], "hidden 1": hidden[1], **dict(layer.named_parameters())}

    def gradients(results: list[Result]) -> dict[str, Tensor]:
        assert all(output.requires_grad for output, _ in results)  # else a rank would not take part in the backward
        total = sum((output * direction).sum() for (output, _), direction in zip(results, directions, strict=True))
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    mail = Mail()
    ranks = [shard(layer, rank, mail) for rank in range(2)]
    found = on_ranks(lambda rank: ranks[rank](hidden[rank], tokens[rank], constraint=constraint, record=False))
    expected = [layer(hidden[rank], tokens[rank], constraint=constraint, record=False) for rank in range(2)]
    for (ours, record), (theirs, local) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
        assert torch.equal(record.load, local.load)
        assert record.dropped == local.dropped
    mine, whole = gradients(found), gradients(expected)
    for name, gradient in whole.items():
        torch.testing.assert_close(mine[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


CLOSE = {torch.float64: {"rtol": 1e-11, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 1e-6}}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("lengths", TOKENS.values(), ids=TOKENS)
def test_experts_on_two_ranks_compute_what_one_has(lengths: tuple[int, int], kernel: str, dtype: torch.dtype) -> None:
    layer = moe_layer(moe_table(balance={}), experts=kernel).to(dtype).eval()
    compare(layer, lengths, None, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("chosen", [(0, 2), (3, 4)])
def test_a_rank_whose_experts_get_no_row(chosen: tuple[int, int], kernel: str, dtype: torch.dtype) -> None:
    layer = moe_layer(moe_table(), experts=kernel).to(dtype).eval()
    allowed = torch.zeros(EXPERTS, dtype=torch.bool)
    allowed[list(chosen)] = True
    compare(layer, (4, 6), allowed, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("everything", [False, True], ids=["some dropped", "all dropped"])
def test_dropping_on_two_ranks(
    everything: bool, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if everything:
        monkeypatch.setattr(
            "finemoe.model.moe.layer.kept_assignments", lambda ids, *others: torch.zeros_like(ids, dtype=torch.bool)
        )
    layer = moe_layer(moe_table(capacity_factor=0.5), experts=kernel).to(dtype).train()
    compare(layer, (4, 6), None, **CLOSE[dtype])


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_layer_in_which_all_is_dropped_has_gradients_of_exactly_zero(
    tokens: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "finemoe.model.moe.layer.kept_assignments", lambda ids, *others: torch.zeros_like(ids, dtype=torch.bool)
    )
    layer = moe_layer(moe_table(num_shared_experts=0, capacity_factor=1.0), experts=kernel).train()
    hidden = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    output, record = layer(hidden, torch.zeros(1, tokens, dtype=torch.int64), constraint=None, record=False)
    output.sum().backward()
    assert not output.any()
    assert record.load.sum() == record.dropped == 2 * tokens
    for gradient in (hidden.grad, *(parameter.grad for parameter in layer.parameters())):
        assert gradient is not None
        assert not gradient.any()
