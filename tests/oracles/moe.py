"""DeepSeekMoE section 3 with every expert run on every token, and dispatch token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor]
"""gate [width, hidden], up [width, hidden], down [hidden, width]."""


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float = math.inf) -> Tensor:
    """down(silu(gate x) * up x) with silu(a) = a / (1 + exp(-a)); V4: gate at most `limit`, up within +- `limit`."""
    a, b = x @ gate.T, x @ up.T
    a = torch.where(a > limit, limit, a)
    b = torch.where(b > limit, limit, torch.where(b < -limit, -limit, b))
    return ((a / (1 + torch.exp(-a))) * b) @ down.T


def unstack(gate_up_proj: Tensor, down_proj: Tensor) -> list[Weights]:
    """The stacked weights of a layer, expert by expert."""
    width = gate_up_proj.shape[1] // 2
    return [(gate_up[:width], gate_up[width:], down) for gate_up, down in zip(gate_up_proj, down_proj, strict=True)]


def separate(gate: Tensor, up: Tensor, down: Tensor, count: int) -> list[Weights]:
    """One wide SwiGLU cut into `count` narrow ones: the shared experts of equation 9."""
    cut = len(gate) // count if count else 0
    return [(gate[i : i + cut], up[i : i + cut], down[:, i : i + cut]) for i in range(0, cut * count, cut or 1)]


def chosen_gates(
    scores: Tensor, k: int, *, normalize: bool, scale: float, allowed: Tensor | None, replay: Tensor | None
) -> tuple[list[list[int]], Tensor]:
    """Equation 10: each token's k best experts, and gates `[tokens, experts]`, 0 where not chosen."""
    chosen, rows = [], []
    for t, row in enumerate(scores):
        candidates = [e for e in range(len(row)) if allowed is None or bool(allowed.expand_as(scores)[t, e])]
        best = sorted(candidates, key=row.detach().tolist().__getitem__, reverse=True)[:k]
        ids = best if replay is None else replay[t].tolist()
        total = sum(row[e] for e in ids) if normalize else 1.0
        rows.append(torch.stack([row[e] / total * scale if e in ids else row[e] * 0 for e in range(len(row))]))
        chosen.append(ids)
    return chosen, torch.stack(rows)


def dense_masked_moe(
    x: Tensor, gates: Tensor, routed: Sequence[Weights], shared: Sequence[Weights], limit: float = math.inf
) -> Tensor:
    """Equation 9 without the residual: every expert on every token, times a gate that is mostly 0."""
    output = torch.zeros_like(x)
    for expert, weights in enumerate(routed):
        output = output + gates[:, expert, None] * swiglu(x, *weights, limit)
    for weights in shared:
        output = output + swiglu(x, *weights, limit)
    return output


def capacity(tokens: int, k: int, num_experts: int, factor: float) -> int:
    """ceil(tokens * k / experts * factor), in exact arithmetic on the factor as written."""
    return math.ceil(Fraction(tokens * k, num_experts) * Fraction(str(factor)))


def kept(expert_ids: Tensor, num_experts: int, factor: float) -> Tensor:
    """GShard Algorithm 1: first choices in token order, then second ones, until an expert is full."""
    tokens, k = expert_ids.shape
    room = [capacity(tokens, k, num_experts, factor)] * num_experts
    keep = torch.zeros(tokens, k, dtype=torch.bool)
    for choice in range(k):
        for token in range(tokens):
            expert = int(expert_ids[token, choice])
            if room[expert]:
                room[expert] -= 1
                keep[token, choice] = True
    return keep


def kept_with_exempt(expert_ids: Tensor, num_experts: int, factor: float, exempt: Tensor) -> Tensor:
    """GShard's order, after the exempt tokens took their seats: all of them, even beyond what there is."""
    tokens, k = expert_ids.shape
    room = [capacity(tokens, k, num_experts, factor)] * num_experts
    keep = torch.zeros(tokens, k, dtype=torch.bool)
    for privileged in (True, False):
        for choice in range(k):
            for token in range(tokens):
                expert = int(expert_ids[token, choice])
                if bool(exempt[token]) == privileged and (privileged or room[expert] > 0):
                    room[expert] -= 1
                    keep[token, choice] = True
    return keep


def kept_on_devices(
    expert_ids: Tensor, gates: Tensor, num_experts: int, num_devices: int, factor: float, exempt: Tensor
) -> Tensor:
    """V2 section 2.2.4: while a device is over its budget, the least of its assignments that may be dropped goes."""
    tokens, k = expert_ids.shape
    keep, listed = torch.ones(tokens, k, dtype=torch.bool), gates.tolist()
    budget = capacity(tokens, k, num_devices, factor)
    for device in range(num_devices):
        held = [
            (t, c) for t in range(tokens) for c in range(k) if expert_ids[t, c] * num_devices // num_experts == device
        ]
        while len(held) > budget and any(not exempt[t] for t, _ in held):
            least = min(((t, c) for t, c in held if not exempt[t]), key=lambda place: listed[place[0]][place[1]])
            held.remove(least)
            keep[least] = False
    return keep


def dispatched(hidden: Tensor, expert_ids: Tensor, num_experts: int, keep: Tensor | None) -> list[Tensor]:
    """The rows that each expert receives, in token order."""
    inbox: list[list[Tensor]] = [[] for _ in range(num_experts)]
    for token in range(len(hidden)):
        for choice, expert in enumerate(expert_ids[token].tolist()):
            if keep is None or keep[token, choice]:
                inbox[expert].append(hidden[token])
    return [torch.stack(rows) if rows else hidden[:0] for rows in inbox]


def combined(outbox: Sequence[Tensor], expert_ids: Tensor, gates: Tensor, keep: Tensor | None, size: int) -> Tensor:
    """Each token's sum of gate times output; `outbox[e]` holds expert e's outputs in token order."""
    unread = [list(rows) for rows in outbox]
    tokens = []
    for token in range(len(expert_ids)):
        total = gates.new_zeros(size)
        for choice, expert in enumerate(expert_ids[token].tolist()):
            if keep is None or keep[token, choice]:
                total = total + gates[token, choice] * unread[expert].pop(0)
        tokens.append(total)
    return torch.stack(tokens)
