"""A made-up comparison of realistic shape. Not a test module."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

# name: (label, routing, final loss, expert parameters in units, active, experts, Pile loss, skew of the load)
ARMS: dict[str, tuple[str, str, float, int, int, int, float | None, float]] = {
    "dense": ("Dense", "one feed-forward network", 2.061, 1, 1, 0, 2.060, 0.0),
    "hash": ("Hash Layer", "16 experts, fixed by token", 1.952, 16, 1, 16, 1.932, 1.1),
    "switch": ("Switch", "16 experts, top 1", 1.899, 16, 1, 16, 1.881, 0.5),
    "gshard": ("GShard", "16 experts, top 2", 1.892, 16, 2, 16, 1.867, 0.35),
    "deepseek-moe": ("DeepSeekMoE", "1 shared + 63 routed, top 7", 1.847, 16, 2, 63, 1.808, 0.25),
    "dense-x4": ("Dense ×4", "4 always on", 1.931, 4, 4, 0, 1.908, 0.0),
    "dense-x16": ("Dense ×16", "16 always on", 1.849, 16, 16, 0, 1.806, 0.0),
    "gshard-x1.2": ("GShard ×1.2", "16 wider experts, top 2", 1.868, 19, 2, 16, 1.824, 0.3),
    "gshard-x1.5": ("GShard ×1.5", "16 wider experts, top 2", 1.850, 24, 3, 16, 1.808, 0.3),
    "1+1/15": ("1 shared + 1 of 15", "1 shared + 15 routed, top 1", 1.880, 16, 2, 15, None, 0.4),
    "1+3/31": ("1 shared + 3 of 31", "1 shared + 31 routed, top 3", 1.861, 16, 2, 31, None, 0.3),
    "2+6/62": ("2 shared + 6 of 62", "2 shared + 62 routed, top 6", 1.846, 16, 2, 62, None, 0.25),
}
LAYERS, POINTS, STEP_TOKENS, UNIT = 4, 40, 819_200, 786_432


def _stat(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "seeds": values}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = 4.303 * deviation / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": values}


def _arm(name: str, seeds: int, draw: random.Random) -> dict[str, Any]:
    label, routing, final, units, active, experts, pile, skew = ARMS[name]
    finals = [final + draw.gauss(0, 0.004) for _ in range(seeds)]
    flops, speed = (1.1e9 + 2e8 * active) * STEP_TOKENS, 41_000 / (1 + 0.12 * active + 0.25 * (experts > 0))
    curve = []
    for seed, end in enumerate(finals):
        for point in range(POINTS + 1):
            step = point * 10
            fall = (end - 1.5) + 3.4 * math.exp(-point / 3.5) + 1.2 * (1 / (1 + point / 6) - 1 / (1 + POINTS / 6))
            noise = draw.gauss(0, 0.006) if point < POINTS else 0.0
            tokens = point * STEP_TOKENS
            curve.append({
                "seed": seed, "step": step, "tokens": tokens, "flops": point * flops,
                "seconds": tokens / speed * (1 + 0.02 * seed), "validation_loss": 1.5 + fall + noise,
            })  # fmt: skip
    load = None
    if experts:
        raw = [[math.exp(draw.gauss(0, skew)) for _ in range(experts)] for _ in range(LAYERS)]
        load = [[value / sum(row) for value in row] for row in raw]
    vio = [max(row) * experts - 1 for row in load or []]
    if vio:
        curve[POINTS]["max_vio"] = sum(vio) / len(vio)  # of the first seed's last validation, whose load is shown
    return {
        "label": label, "routing": routing, "validation_loss": _stat(finals),
        "bits_per_byte": _stat([value / 2.31 for value in finals]),
        "max_vio": _stat([sum(vio) / len(vio) * (1 + 0.02 * seed) for seed in range(seeds)]) if vio else None,
        "dead_experts": (0.0 if name != "hash" else 0.02) if vio else None,
        "total_parameters": UNIT * (units + 4), "active_parameters": UNIT * (active + 4),
        "expert_parameters": UNIT * units, "active_expert_parameters": UNIT * active,
        "training_flops": POINTS * flops, "seconds": POINTS * STEP_TOKENS / speed, "tokens": POINTS * STEP_TOKENS,
        "tokens_per_second": speed, "learning_rate": 2e-3,
        "mismatch": {"total_percent": draw.gauss(0, 0.3), "active_percent": draw.gauss(0, 0.3), "flops_percent": 0.02},
        "paper": {"name": label, "pile_loss": pile} if pile else None, "curve": curve, "load": load,
        "sample": {
            "prompt": "Once upon a time, a small robot",
            "completion": f" was lost in the garden. It said: \"I am {label}\" & rolled on.\n\nThe cat looked. " * 3,
        },
    }  # fmt: skip


def fake_results(count: int = 5, seeds: int = 3) -> dict[str, Any]:
    """`count` arms, with every pair against the last of them tested."""
    draw = random.Random(7)
    arms = {name: _arm(name, seeds, draw) for name in list(ARMS)[:count]}
    pairs = []
    names = list(arms)
    for index, a in enumerate(names):
        for b in names[index + 1 :]:
            difference = arms[a]["validation_loss"]["mean"] - arms[b]["validation_loss"]["mean"]
            half = 0.014 if seeds > 1 else None
            low, high = (None, None) if half is None else (difference - half, difference + half)
            decided = half is not None and abs(difference) > half
            verdict = "undecided" if not decided else "better" if difference < 0 else "worse"
            why = "the interval excludes zero" if decided else "the interval includes zero" if half else "one seed"
            pairs.append({
                "a": a, "b": b, "difference": difference, "low": low, "high": high, "verdict": verdict, "reason": why,
            })  # fmt: skip
    return copy.deepcopy({
        "schema": 1, "finemoe_version": "0.1.0", "title": "Five architectures at matched compute",
        "date": "2025-03-04T10:11:12+00:00", "command": "finemoe compare recipes/compare-five.toml --seeds 3",
        "machine": {
            "processor": "Example CPU", "cores": 2, "memory_gib": 7.6, "python": "3.11.9", "torch": "2.8.0",
            "device": "cpu", "precision": "float32", "threads_per_run": 1, "parallel_runs": 2,
        },
        "recipe": {"model": {"hidden_size": 128, "num_layers": 4, "tied": True}, "data": {"corpus": "tiny-stories"},
                   "optimizer": {"learning_rate": 0.002, "betas": [0.9, 0.95]}},
        "complete": True, "budget": {"kind": "tokens", "value": POINTS * STEP_TOKENS},
        "notes": ["Gate weights are not rescaled, as published.", "One learning rate for all arms; not tuned by arm."],
        "matching": {"reference_width": 342, "total_multiple": 16, "active_multiple": 2,
                     "text": ["Expert parameters: 16 × the dense feed-forward network; active: 2 ×.",
                              "Every arm sees the same tokens in the same order."]},
        "arms": arms, "pairs": pairs,
    })  # fmt: skip
