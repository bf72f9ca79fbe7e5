"""What upcycling is worth on a small model: at equal further FLOPs, and beside a mixture that was never dense.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/upcycling.py
    python benchmarks/upcycling.py --quick --out try.json     # a minute, to see that everything works

For each seed a small dense model is trained on the interpreter's standard library. Then, all on one thread:

    dense       the dense model, trained on
    upcycled    its mixture with equal copies, trained on
    redrawn     the same with half of each copy's neurons drawn anew
    scratch     a mixture of the same shape from drawn weights, given only those further FLOPs
    whole       the same, given those and what the dense model's own training had cost

A token costs the mixture what it costs the dense model (`finemoe.model.size.measure`; routers are left out there), so
that equal FLOPs are equally many tokens. Data of one seed: the dense model reads sequences 0 to n, what is trained
further and `scratch` read from n on, in the same order, and `whole` reads all of them. No learning rate was searched.
All schedules begin anew, with a new optimizer; selection biases move as
`finemoe train` moves them by default. Every mixture that comes out is merged back into a dense model, whose
held-out loss is measured as it is. Results go to benchmarks/results/upcycling.json after every seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finemoe.core.environment import environment
from finemoe.methods.merging import MergingConfig, densified_config, merge_weights
from finemoe.methods.upcycling import UpcyclingConfig, copies_apart, upcycle_weights, upcycled_config
from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.runs.config import resolve_run
from finemoe.runs.run import first_trainer
from finemoe.runs.start import build_method
from finemoe.studies.statistics import interval, paired
from finemoe.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "upcycling.json"
LENGTH, STEP_TOKENS, COPIES, RATE = 128, 2048, 4, 3e-3
FURTHER = ("dense", "upcycled", "redrawn")
ARMS = (*FURTHER, "scratch", "whole")
PAIRS = (
    ("upcycled", "dense"), ("redrawn", "dense"), ("redrawn", "upcycled"), ("upcycled", "scratch"),
    ("redrawn", "scratch"), ("upcycled", "whole"), ("redrawn", "whole"), ("dense", "whole"),
)  # fmt: skip
Weights = Mapping[str, Tensor]


def dense_model(hidden: int, layers: int, width: int) -> ModelConfig:
    """Heads of 32, initial weights of 0.02."""
    heads = hidden // 32
    table = {
        "vocab_size": 2048,
        "hidden_size": hidden,
        "num_layers": layers,
        "attention": {"kind": "grouped_query", "num_heads": heads, "num_kv_heads": heads, "head_dim": 32},
        "feed_forward": {"kind": "dense", "ffn_hidden_size": width},
        "init_std": 0.02,
    }
    return expand(resolve(table, "the study"))


def trainer_of(model: ModelConfig, steps: int, seed: int, *, weights: Weights | None = None, first: int = 0) -> Trainer:
    """A trainer at its beginning.

    Args:
        model: what to train.
        steps: how long.
        seed: of drawn weights and the order of the data.
        weights: to begin with; None: drawn.
        first: sequences of the data that are passed by.
    """
    recipe = {
        "seed": seed,
        "model": model.model_dump(),
        "data": {"sequence_length": LENGTH, "max_validation_tokens": 32_768},
        "training": {"steps": steps, "tokens_per_step": STEP_TOKENS, "threads": 1, "device": "cpu"},
        "optimizer": {"learning_rate": RATE},
        "kernels": {"experts": "native", "products": "native"},
    }
    if model.moe_layers and weights is not None:
        recipe["balancing"] = {"rate": 0.001}  # as for `start_from`
    config = resolve_run(recipe, "the study")
    trainer, _ = first_trainer(config, build_method(config))
    if weights is not None:
        trainer.model.load_state_dict(dict(weights))
    trainer.state = replace(trainer.state, position=first)
    return trainer


def trained(trainer: Trainer, apart: UpcyclingConfig | None = None) -> dict[str, Any]:
    """Train to the end; the held-out loss before and after, and how far copies are apart on the way."""
    found: dict[str, Any] = {"loss_before": trainer.measure().headline, "apart": {}}
    if apart is not None:
        last = trainer.plan.total_steps
        for step in (*(mark for mark in (0, 1, 10, 100) if mark < last), last):
            trainer.run(step)
            found["apart"][str(step)] = asdict(copies_apart(trainer.model, apart))
    trainer.run()
    found["seconds"] = round(trainer.state.seconds, 1)
    found["loss"] = trainer.measure().headline
    return found


def merged(trainer: Trainer, further: Callable[[ModelConfig, Weights], Trainer]) -> dict[str, float]:
    """Held-out loss of dense models made of the mixture, by how its experts were grouped and weighed."""
    load = trainer.measure().load  # type: ignore[attr-defined]
    found = {}
    trainer.model.eval()
    for config in (MergingConfig(group="position"), MergingConfig(group="similar")):
        for name, loads in (("alike", None), ("by load", load)):
            dense = densified_config(trainer.model.config, config)
            made = dict(merge_weights(trainer.model, config, loads))
            found[f"{config.group}, {name}"] = further(dense, made).measure().headline
    return found


def one_seed(seed: int, dense: ModelConfig, before: int, after: int) -> dict[str, Any]:
    """All arms of a seed."""
    first = before * STEP_TOKENS // LENGTH
    start = trainer_of(dense, before, seed)
    begun = trained(start)
    say(seed, "the dense model", begun)
    base = {name: tensor.clone() for name, tensor in start.model.state_dict().items()}
    found: dict[str, Any] = {"start": begun}
    for arm in ARMS:
        config = UpcyclingConfig(copies=COPIES, seed=seed, redrawn=0.5 if arm == "redrawn" else 0.0)
        model, weights = upcycled_config(dense, config), None
        if arm == "dense":
            model, weights = dense, base
        elif arm in FURTHER:
            weights = dict(upcycle_weights(base, dense, config))
        steps, passed = (before + after, 0) if arm == "whole" else (after, first)
        trainer = trainer_of(model, steps, seed, weights=weights, first=passed)
        found[arm] = trained(trainer, config if arm in ("upcycled", "redrawn") else None)
        if arm != "dense":
            found[arm]["merged"] = merged(trainer, lambda one, made: trainer_of(one, 1, 0, weights=made))
        say(seed, arm, found[arm])
    return found


def say(seed: int, arm: str, found: Mapping[str, Any]) -> None:
    """One line of what came out."""
    print(f"seed {seed} {arm}: {found['loss_before']:.4f} -> {found['loss']:.4f} in {found['seconds']} s", flush=True)
    for step, one in found["apart"].items():
        print(f"    step {step}: copies apart {one['mean']:.2e} on average, {one['least']:.2e} at least", flush=True)
    for how, loss in found.get("merged", {}).items():
        print(f"    merged by {how}: {loss:.4f}", flush=True)


def summary(seeds: Mapping[int, Any]) -> dict[str, Any]:
    """Means with intervals over the seeds, and paired differences of the held-out loss."""

    def of(arm: str) -> dict[int, float]:
        return {seed: found[arm]["loss"] for seed, found in seeds.items()}

    merges = {
        f"{arm}: {how}": asdict(interval([found[arm]["merged"][how] for found in seeds.values()]))
        for arm in ARMS[1:]
        for how in next(iter(seeds.values()))[arm]["merged"]
    }
    return {
        "loss": {arm: asdict(interval(list(of(arm).values()))) for arm in ("start", *ARMS)},
        "differences": {f"{a} - {b}": asdict(paired(of(a), of(b))) for a, b in PAIRS},
        "merged": merges,
    }


def show(found: Mapping[str, Any]) -> None:
    """The tables."""

    def line(name: str, one: Mapping[str, Any], rest: str = "") -> None:
        ends = "" if one["low"] is None else f" ({one['low']:.4f} to {one['high']:.4f})"
        print(f"{name:40} {one['mean']:8.4f}{ends} {rest}")

    print("\nheld-out loss, nats a token, mean and 95 % interval over the seeds")
    for arm, one in found["loss"].items():
        line(arm, one)
    print("\npaired differences")
    for name, one in found["differences"].items():
        line(name, one["difference"], one["verdict"])
    print("\nmerged into a dense model, as it is")
    for name, one in found["merged"].items():
        line(name, one)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, few steps, two seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=240, help="steps of the dense model")
    parser.add_argument("--after", type=int, default=120, help="steps that follow")
    parser.add_argument("--out", type=Path, default=None, help="where to write; benchmarks/results/upcycling.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense = dense_model(96, 4, 256)
    if given.quick:
        dense, given.before, given.after, given.seeds = dense_model(32, 1, 64), 20, 12, min(given.seeds, 2)
    elif given.out is None:
        given.out = RESULTS
    mixture = upcycled_config(dense, UpcyclingConfig(copies=COPIES))
    sizes = {name: measure(one, LENGTH) for name, one in (("dense", dense), ("mixture", mixture))}
    began, seeds = time.time(), {}
    for seed in range(given.seeds):
        seeds[seed] = one_seed(seed, dense, given.before, given.after)
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": environment(),
            "threads": 1,
            "seconds": round(time.time() - began),
            "models": {name: size.to_dict() for name, size in sizes.items()},
            "config": {"dense": dense.model_dump(mode="json"), "mixture": mixture.model_dump(mode="json")},
            "learning_rate": RATE,
            "tokens": {"before": given.before * STEP_TOKENS, "after": given.after * STEP_TOKENS},
            "seeds": {str(number): found for number, found in seeds.items()},
            **summary(seeds),
        }
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
