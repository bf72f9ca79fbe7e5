"""How evenly experts are used, and which are used together: figures over counts of assignments.

`load [experts]` is how often each routed expert was chosen. Everything here is numpy and has no opinion about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finemoe.model.moe.balance import max_violation
from finemoe.training.alerts import STARVED, effective_experts

Counts = NDArray[np.int64]


def entropy(load: ArrayLike) -> float:
    """Entropy of the shares over ln(experts): 1 is even, 0 is one expert for everything (or no load)."""
    counts = np.asarray(load, dtype=np.float64)
    effective = effective_experts(counts)
    if not effective:
        return 0.0
    return float(np.log(effective) / np.log(len(counts))) if len(counts) > 1 else 1.0


def variation(load: ArrayLike) -> float:
    """Coefficient of variation: standard deviation over experts, divided by the mean; 0 for no load."""
    counts = np.asarray(load, dtype=np.float64)
    return float(counts.std() / counts.mean()) if counts.any() else 0.0


def load_figures(load: ArrayLike, starved: float = STARVED) -> dict[str, Any]:
    """The load of one layer and all its figures, as JSON takes them.

    Args:
        load: [experts] assignments.
        starved: an expert with less than this share of an even load is counted as such.
    """
    counts = np.asarray(load, dtype=np.int64)
    return {
        "load": counts.tolist(),
        "max_vio": max_violation(counts),
        "entropy": entropy(counts),
        "effective_experts": effective_experts(counts),
        "variation": variation(counts),
        "dead": int((counts == 0).sum()),
        "starved": int((counts < starved * counts.mean()).sum()),
    }


def pair_counts(expert_ids: NDArray[Any], experts: int) -> Counts:
    """`[experts, experts]`: tokens that chose both; the diagonal is the load. `expert_ids [tokens, k]`, distinct."""
    chosen = np.zeros((len(expert_ids), experts), dtype=np.float32)
    np.put_along_axis(chosen, expert_ids.astype(np.int64), 1.0, axis=1)
    return np.rint(chosen.T @ chosen).astype(np.int64)  # exact: a batch has far fewer than 2^24 tokens


def lift(pairs: Counts, tokens: int, experts_per_token: int) -> NDArray[np.float64]:
    """How much more often two experts are chosen together than k different ones drawn apart from each other.

    P(i and j) / (P(i) P(j)), over what that ratio is where k of N evenly used experts are drawn without regard to each
    other, N (k - 1) / ((N - 1) k): a token that has chosen i has one choice fewer for j. 1 is chance. NaN on the
    diagonal, for experts never chosen, and where a token has one expert only.

    Args:
        pairs: as from `pair_counts`, summed.
        tokens: that were counted.
        experts_per_token: k.
    """
    load = np.diagonal(pairs).astype(np.float64)
    experts = len(load)
    result = np.full((experts, experts), np.nan)
    if experts_per_token < 2 or not tokens:
        return result
    chance = experts * (experts_per_token - 1) / ((experts - 1) * experts_per_token)
    used = np.outer(load, load)
    np.divide(pairs * float(tokens), used * chance, out=result, where=used > 0)
    np.fill_diagonal(result, np.nan)
    return result


def strongest_pairs(
    pairs: Counts, tokens: int, experts_per_token: int, most: int = 10, least_count: int = 20
) -> list[dict[str, Any]]:
    """The pairs of the highest lift, those left out that an even load would bring together less than `least_count`
    times or that were: their lift is chance."""
    lifts = lift(pairs, tokens, experts_per_token)
    rows, columns = np.triu_indices(len(pairs), k=1)
    load = np.diagonal(pairs).astype(np.float64)
    expected = load[rows] * load[columns] / max(tokens, 1)
    kept = np.isfinite(lifts[rows, columns]) & (np.maximum(expected, pairs[rows, columns]) >= least_count)
    rows, columns = rows[kept], columns[kept]
    order = np.argsort(-lifts[rows, columns], kind="stable")[:most]
    return [
        {"a": int(a), "b": int(b), "count": int(pairs[a, b]), "lift": float(lifts[a, b])}
        for a, b in zip(rows[order], columns[order], strict=True)
    ]


def mean(values: Sequence[float]) -> float | None:
    """Of what there is; None of nothing."""
    return sum(values) / len(values) if values else None
