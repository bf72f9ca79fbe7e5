"""Routers as loops over tokens, groups and experts: V2 section 2.2.2, V3 section 2.1.2, and the 10 % of V2 2.2.4."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCORES = {
    "softmax": lambda row: [math.exp(x - max(row)) / sum(math.exp(y - max(row)) for y in row) for x in row],
    "sigmoid": lambda row: [1 / (1 + math.exp(-x)) for x in row],
    "sqrtsoftplus": lambda row: [math.sqrt(math.log1p(math.exp(x))) for x in row],
}


def groups_of(experts: int, num_groups: int) -> list[range]:
    """Consecutive experts, the same number in each group."""
    size = experts // num_groups
    return [range(g * size, (g + 1) * size) for g in range(num_groups)]


def choose(
    merits: Sequence[float],
    k: int,
    *,
    num_groups: int = 1,
    per_token: int = 1,
    best: int = 1,
    allowed: Sequence[bool] | None = None,
) -> list[int]:
    """One token's experts, best first: the k of highest merit in the groups whose `best` highest merits sum highest.

    Disallowed experts are not there; if those groups hold fewer than k, every allowed expert may be chosen.
    """
    there = [e for e in range(len(merits)) if allowed is None or allowed[e]]
    inside = reachable(merits, num_groups=num_groups, per_token=per_token, best=best, allowed=allowed)
    candidates = inside if len(inside) >= k else there
    return sorted(candidates, key=lambda e: -merits[e])[:k]


def reachable(
    merits: Sequence[float], *, num_groups: int, per_token: int, best: int, allowed: Sequence[bool] | None
) -> list[int]:
    """The allowed experts of the `per_token` best groups."""
    there = [e for e in range(len(merits)) if allowed is None or allowed[e]]
    scored = []
    for group in groups_of(len(merits), num_groups):
        members = sorted((merits[e] for e in group if e in there), reverse=True)
        if members:
            scored.append((sum(members[:best]), group))
    kept = [group for _, group in sorted(scored, key=lambda pair: -pair[0])[:per_token]]
    return [e for e in there if any(e in group for group in kept)]


def gates_of(scores: Tensor, ids: Sequence[Sequence[int]], *, normalize: bool, scale: float) -> Tensor:
    """`[tokens, k]`: the chosen scores, over their sum where normalised, times the scale."""
    rows = []
    for row, chosen in zip(scores, ids, strict=True):
        total = sum(row[e] for e in chosen) if normalize else 1.0
        rows.append(torch.stack([row[e] / total * scale for e in chosen]))
    return torch.stack(rows)
