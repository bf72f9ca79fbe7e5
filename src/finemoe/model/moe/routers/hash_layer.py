"""Hash Layer (Roller et al., 2021): a fixed table from token id to expert. Nothing is learned and no gate weighs."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from finemoe.core.config import Config
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision


class HashLayerConfig(Config):
    """`random` draws each token's expert evenly; `balanced` deals tokens out by frequency, so that loads are even."""

    kind: Literal["hash_layer"] = "hash_layer"
    learned: ClassVar[bool] = False
    scores_sum_to_one: ClassVar[bool] = True
    selects_with_bias: ClassVar[bool] = False
    table: Literal["random", "balanced"] = "random"
    """How token ids are assigned: drawn evenly, or so that experts get equally many tokens of the corpus."""

    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """Nothing is learned."""
        return 0


class HashLayerRouter(nn.Module):
    """Token id to `experts_per_token` distinct experts, each with weight 1 / experts_per_token."""

    expert_of_token: Tensor

    def __init__(
        self,
        config: HashLayerConfig,
        hidden_size: int,
        num_experts: int,
        experts_per_token: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        # Part of the weights: a checkpoint without its table would route every token elsewhere.
        self.register_buffer("expert_of_token", torch.zeros(vocab_size, experts_per_token, dtype=torch.int64))

    def reset(self, draw: torch.Generator, frequencies: Callable[[], Tensor] | None) -> None:
        """Draw the table; `frequencies` gives [vocab] counts of the training text and is called when balanced.

        Raises:
            ValueError: a balanced table without frequencies.
        """
        self.fill_table(draw, frequencies() if frequencies and self.config.table == "balanced" else None)

    def fill_table(self, generator: torch.Generator, frequencies: Tensor | None) -> None:
        """Draw the table. `frequencies [vocab]`: token counts of the training text, needed when balanced.

        Raises:
            ValueError: a balanced table without frequencies.
        """
        if self.config.table == "random":
            draws = torch.rand(self.expert_of_token.shape[0], self.num_experts, generator=generator)
            self.expert_of_token.copy_(draws.topk(self.expert_of_token.shape[1], dim=-1).indices)
            return
        if frequencies is None:
            raise ValueError('a hash_layer router with table = "balanced" needs the token frequencies of the corpus')
        self.expert_of_token.copy_(_balanced_table(frequencies, *self._shape(), generator))

    def _shape(self) -> tuple[int, int]:
        return self.num_experts, self.expert_of_token.shape[1]

    def parts(self) -> None:
        """C++ looks nothing up."""

    def forward(self, hidden: Tensor, tokens: Tensor, constraint: RoutingConstraint | None) -> RoutingDecision:
        """`hidden [tokens, hidden]` only gives dtype and device; `tokens [tokens]` ids decide."""
        expert_ids = self.expert_of_token[tokens]
        if constraint is not None:
            expert_ids = _constrained(expert_ids, self.num_experts, constraint)
        gates = hidden.new_full(expert_ids.shape, 1.0 / expert_ids.shape[1])
        scores = torch.zeros(tokens.shape[0], self.num_experts, device=hidden.device)
        scores.scatter_(1, expert_ids, 1.0 / expert_ids.shape[1])
        return RoutingDecision(expert_ids, gates, scores, logits=None)


def _constrained(expert_ids: Tensor, num_experts: int, constraint: RoutingConstraint) -> Tensor:
    """The table's choice, or the next allowed expert after it, round the circle."""
    if constraint.replay is not None:
        return constraint.replay
    count = constraint.num_active or expert_ids.shape[1]
    if constraint.allowed is None and not constraint.num_masked and count <= expert_ids.shape[1]:
        return expert_ids[:, :count]
    allowed = torch.ones(expert_ids.shape[0], num_experts, dtype=torch.bool, device=expert_ids.device)
    if constraint.allowed is not None:
        allowed = allowed & constraint.allowed
    if constraint.num_masked:
        allowed = allowed.scatter(1, _walk(expert_ids, constraint.num_masked, allowed), False)
    return _walk(expert_ids, count, allowed)


def _walk(expert_ids: Tensor, count: int, allowed: Tensor) -> Tensor:
    """The first `count` allowed experts in the order of the table: its own, or the next after each, then on round."""
    allowed, num_experts = allowed.clone(), allowed.shape[1]
    missing = max(0, count - expert_ids.shape[1])
    # More experts than the table holds: the next ones after its last choice.
    columns = torch.cat((expert_ids, expert_ids[:, -1:].expand(-1, missing)), dim=1)[:, :count]
    chosen = []
    for column in columns.unbind(1):
        circle = (column[:, None] + torch.arange(num_experts, device=column.device)) % num_experts
        first = allowed.gather(1, circle).to(torch.int8).argmax(dim=1, keepdim=True)
        chosen.append(circle.gather(1, first))
        allowed.scatter_(1, chosen[-1], False)
    return torch.cat(chosen, dim=1)


def _balanced_table(frequencies: Tensor, num_experts: int, k: int, generator: torch.Generator) -> Tensor:
    """Most frequent token first, each to the k experts with the least load so far (ties in random order)."""
    ties = torch.randperm(num_experts, generator=generator).tolist()
    heap = [(0, ties[expert], expert) for expert in range(num_experts)]
    heapq.heapify(heap)
    table = torch.zeros(len(frequencies), k, dtype=torch.int64)
    for token in frequencies.argsort(descending=True, stable=True).tolist():
        taken = [heapq.heappop(heap) for _ in range(k)]
        for column, (load, tie, expert) in enumerate(taken):
            table[token, column] = expert
            heapq.heappush(heap, (load + int(frequencies[token]), tie, expert))
    return table
