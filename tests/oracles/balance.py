"""The balance losses of DeepSeekMoE section 3.3 for ONE sequence, and the router z loss of ST-MoE."""

from __future__ import annotations

import torch
from torch import Tensor


def load_and_importance(expert_ids: Tensor, scores: Tensor) -> tuple[list[float], list[Tensor]]:
    """f_i = N'/(K'T) * (tokens that choose i), P_i = 1/T * sum of s_i (equations 13 and 14)."""
    (tokens, k), experts = expert_ids.shape, scores.shape[1]
    f = [experts / (k * tokens) * sum(i in row for row in expert_ids.tolist()) for i in range(experts)]
    importance = [sum(scores[t, i] for t in range(tokens)) / tokens for i in range(experts)]
    return f, importance  # type: ignore[return-value]


def expert_loss(expert_ids: Tensor, scores: Tensor) -> Tensor:
    """Equation 12 with a coefficient of 1."""
    f, importance = load_and_importance(expert_ids, scores)
    return sum(f_i * p_i for f_i, p_i in zip(f, importance, strict=True))  # type: ignore[return-value]


def device_loss(expert_ids: Tensor, scores: Tensor, num_devices: int) -> Tensor:
    """Equations 15 to 17 with a coefficient of 1; devices hold consecutive experts."""
    f, importance = load_and_importance(expert_ids, scores)
    size = len(f) // num_devices
    groups = [range(d * size, (d + 1) * size) for d in range(num_devices)]
    return sum(sum(f[i] for i in g) / size * sum(importance[i] for i in g) for g in groups)  # type: ignore[return-value]


def z_loss(logits: Tensor) -> Tensor:
    """ST-MoE equation 5: the mean over tokens of (log sum exp x)^2."""
    return sum(torch.log(sum(torch.exp(x) for x in row)) ** 2 for row in logits) / len(logits)  # type: ignore[return-value]


def communication_loss(expert_ids: Tensor, scores: Tensor, num_devices: int, devices_per_token: int) -> Tensor:
    """V2 equations 29 to 31 with a coefficient of 1: f'' counts a token once on each device that it is sent to."""
    (tokens, _), size = expert_ids.shape, scores.shape[1] // num_devices
    sent = [sum(any(e // size == d for e in row) for row in expert_ids.tolist()) for d in range(num_devices)]
    importance = [
        sum(scores[t, d * size : (d + 1) * size].sum() for t in range(tokens)) / tokens for d in range(num_devices)
    ]
    return sum(num_devices / (devices_per_token * tokens) * sent[d] * importance[d] for d in range(num_devices))  # type: ignore[return-value]


def sequence_loss(scores: Tensor, k: int) -> Tensor:
    """V3 equations 17 to 20 with a coefficient of 1: f of the k best unbiased scores, P of scores over their sum."""
    tokens, experts = scores.shape
    best = [sorted(range(experts), key=row.__getitem__, reverse=True)[:k] for row in scores.tolist()]
    f = [experts / (k * tokens) * sum(i in row for row in best) for i in range(experts)]
    importance = [sum(scores[t, i] / scores[t].sum() for t in range(tokens)) / tokens for i in range(experts)]
    return sum(f_i * p_i for f_i, p_i in zip(f, importance, strict=True))  # type: ignore[return-value]
