"""finemoe's own peak memory and step time on this machine, as `finemoe plan --device here` predicts them, and measured.

python benchmarks/planner.py            # writes benchmarks/results/planner.json, about five minutes
python benchmarks/planner.py --fit      # fits and judges again what was measured, after a change of the planner

Each setting trains for a few steps in a process of its own, with one thread and torch's kernels, which are what the
planner counts. Every second setting, in the order below, fits constants (what a process takes at any rate and a factor
on activations; six of the time); the others judge. Memory is the process's resident height, in which a busy machine
does not meddle. Time is the processor's, the median of the steps, and peaks are measured in the same process before
and after: both so that others' work disturbs less. On a busy machine it still does, since caches and memory are shared:
the load is recorded.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

STEPS = 4
_ATTENTION = {"kind": "grouped_query", "head_dim": 64}
_MIX = {"kind": "moe", "num_routed_experts": 16, "num_shared_experts": 1, "experts_per_token": 4}


def _setting(
    name: str, hidden: int, layers: int, feed_forward: dict[str, Any], tokens: int, length: int, **more: Any
) -> dict[str, Any]:
    heads = hidden // 64
    model = {
        "vocab_size": 4096, "hidden_size": hidden, "num_layers": layers,
        "attention": {**_ATTENTION, "num_heads": heads, "num_kv_heads": heads},
        "feed_forward": feed_forward,
    }  # fmt: skip
    return {"name": name, "model": model, "sequences": tokens // length, "length": length, "recompute": False, **more}


def _mix(width: int, **more: Any) -> dict[str, Any]:
    return {**_MIX, "expert_hidden_size": width, "router": {"kind": "softmax_topk"}, **more}


SETTINGS = (
    _setting("dense, wide", 512, 4, {"kind": "dense", "ffn_hidden_size": 1536}, 2048, 256),
    _setting("dense, deep", 256, 12, {"kind": "dense", "ffn_hidden_size": 768}, 2048, 256),
    _setting("experts", 256, 6, _mix(192), 2048, 256),
    _setting("experts, wider", 384, 4, _mix(256), 2048, 256),
    _setting("many experts", 256, 4, _mix(128, num_routed_experts=64, experts_per_token=6), 1024, 256),
    _setting("experts, long", 256, 4, _mix(192), 4096, 1024),
    _setting("experts, recomputed", 256, 8, _mix(192), 4096, 256, recompute=True),
    _setting("many experts, recomputed", 384, 6, _mix(128, num_routed_experts=32), 2048, 512, recompute=True),
    _setting("dense, long", 384, 4, {"kind": "dense", "ffn_hidden_size": 1024}, 4096, 1024),
    _setting("mostly state", 512, 6, _mix(256, num_routed_experts=32), 512, 256),
)


def config_of(setting: dict[str, Any]) -> Any:
    """The model of a setting."""
    from finemoe.model.config import expand
    from finemoe.model.presets import resolve

    return expand(resolve(setting["model"], setting["name"]))


def child(setting: dict[str, Any]) -> dict[str, float]:
    """Train, in this process: resident height and the median step."""
    import gc
    import time

    import torch

    from finemoe.core import memory
    from finemoe.model.config import Kernels
    from finemoe.model.initialize import initialize
    from finemoe.model.transformer import Transformer
    from finemoe.runs.planning.measured import bandwidth, product_flops

    torch.set_num_threads(1)
    memory.keep_freed_pages()  # as `finemoe train` does
    before = product_flops(time.process_time), bandwidth(time.process_time)
    gc.collect()
    memory.forget_peak()
    kernels = Kernels(products="torch", experts="sorted_slices", attention="sdpa", recompute=setting["recompute"])
    model = Transformer(config_of(setting), kernels)
    initialize(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocabulary = model.config.vocab_size
    times = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(vocabulary, (setting["sequences"], setting["length"]), generator=generator)
        started = time.process_time()
        hidden = model(tokens).hidden.flatten(0, 1)
        weights = torch.ones(len(hidden))
        loss = model.backend.cross_entropy_sum(hidden, model.head_weight, tokens.flatten(), weights) / len(hidden)
        loss.backward()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]))  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - started)
    peak = memory.peak_bytes()
    after = product_flops(time.process_time), bandwidth(time.process_time)
    peaks = {"product_flops": (before[0] + after[0]) / 2, "bandwidth": (before[1] + after[1]) / 2}
    return {"peak": peak, "seconds": statistics.median(times[1:]), **peaks}


def setup_of(setting: dict[str, Any]) -> Any:
    """As the planner takes it."""
    from finemoe.parallel.planner.setup import Setup

    sequences = setting["sequences"]
    return Setup(
        sequences=sequences, micro_batch=sequences, seq_len=setting["length"], precision="fp32",
        recompute=setting["recompute"],
    )  # fmt: skip


def predict_memory(setting: dict[str, Any], beside: float, factor: float) -> float:
    """Bytes of a process. On a CPU the loss works in small chunks: of the head's gradient alone a copy is made."""
    from finemoe.parallel.planner.memory import peak_memory

    config = config_of(setting)
    found = peak_memory(config, setup_of(setting), beside=0)
    head = 4 * config.vocab_size * config.hidden_size
    return beside + found.state + head + factor * found.activations


def predict_seconds(setting: dict[str, Any], peaks: dict[str, float], constants: Any) -> float:
    """Of a step."""
    from finemoe.parallel.planner.devices import this_machine
    from finemoe.parallel.planner.step_time import step_time

    device = this_machine(product_flops=peaks["product_flops"], memory=1 << 34, bandwidth=peaks["bandwidth"])
    return float(step_time(config_of(setting), setup_of(setting), device, constants).total)


def fit_memory(settings: list[dict[str, Any]], measured: list[dict[str, float]]) -> tuple[float, float]:
    """What a process takes at any rate, and the factor on activations: least relative squares."""
    from scipy.optimize import least_squares

    def misses(values: Any) -> list[float]:
        return [
            predict_memory(one, values[0] * 1e8, values[1]) / found["peak"] - 1
            for one, found in zip(settings, measured, strict=True)
        ]

    beside, factor = least_squares(misses, [3.0, 1.0]).x
    return float(beside * 1e8), float(factor)


def fit_time(settings: list[dict[str, Any]], measured: list[dict[str, float]]) -> Any:
    """Constants of this machine, near their priors where the runs do not say.

    The peak is what a large product reaches here, so products reach all of it but for what they read and write. Of the
    first setting, which is fitted, torch's profiler gives 10 % to operations that are neither products nor attention:
    sixteen passes.
    """
    from scipy.optimize import least_squares

    from finemoe.parallel.planner.step_time import Constants

    names = ("bf16", "experts", "scores", "passes", "operands", "host")
    prior = Constants(
        bf16=1, fp8=1, experts=0.8, scores=0.3, passes=16, operands=1, casts=0, exposed=1, host=2e-3, torch=1
    )

    def constants_of(logs: Any) -> Any:
        return replace(prior, **{name: math.exp(value) for name, value in zip(names, logs, strict=True)})

    start = [math.log(asdict(prior)[name]) for name in names]

    def misses(logs: Any) -> list[float]:
        constants = constants_of(logs)
        found = [
            math.log(predict_seconds(one, taken, constants) / taken["seconds"]) / 0.08
            for one, taken in zip(settings, measured, strict=True)
        ]
        return found + [(value - usual) / 0.5 for value, usual in zip(logs, start, strict=True)]

    return constants_of(least_squares(misses, start).x)


def measure() -> dict[str, Any]:
    """Every setting, the fit, and the verdict."""
    from finemoe.core.environment import environment

    measured = measure_all()
    return {
        "kind": "planner", "steps": STEPS, "load_average": os.getloadavg(), **fit_and_judge(measured),
        "machine": environment(),
    }  # fmt: skip


def fit_again(path: Path) -> dict[str, Any]:
    """What was measured before, with the planner as it is now."""
    before = json.loads(path.read_text(encoding="utf-8"))
    kept = ("peak", "seconds", "product_flops", "bandwidth")
    measured = [{name: row[name] for name in kept} for row in before["settings"]]
    return {**before, **fit_and_judge(measured)}


def measure_all() -> list[dict[str, float]]:
    """Each setting in a process of its own."""
    measured = []
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    for setting in SETTINGS:
        words = [sys.executable, __file__, "--child", json.dumps(setting)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environ)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(setting["name"], measured[-1], file=sys.stderr, flush=True)
    return measured


def fit_and_judge(measured: list[dict[str, float]]) -> dict[str, Any]:
    """Constants from every second setting, and how the others come out."""
    fitted = list(SETTINGS[::2]), measured[::2]
    beside, factor = fit_memory(*fitted)
    constants = fit_time(*fitted)
    rows = []
    for number, (setting, found) in enumerate(zip(SETTINGS, measured, strict=True)):
        memory, seconds = predict_memory(setting, beside, factor), predict_seconds(setting, found, constants)
        rows.append(
            {
                "name": setting["name"], "part": "judged" if number % 2 else "fitted", **found,
                "predicted_peak": memory, "memory_error": memory / found["peak"] - 1,
                "predicted_seconds": seconds, "time_error": seconds / found["seconds"] - 1,
            }
        )  # fmt: skip
    judged = [row for row in rows if row["part"] == "judged"]
    verdict = {
        kind: {
            "median": statistics.median(abs(row[kind]) for row in judged),
            "worst": max(abs(row[kind]) for row in judged),
            "within_10_percent": sum(abs(row[kind]) <= 0.1 for row in judged),
            "of": len(judged),
        }
        for kind in ("memory_error", "time_error")
    }
    return {
        "beside": beside, "activation_factor": factor, "constants": asdict(constants), "judged": verdict,
        "settings": rows,
    }  # fmt: skip


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return
    again = sys.argv[1:2] == ["--fit"]
    words = sys.argv[1 + again :]
    out = Path(words[0]) if words else Path(__file__).parent / "results" / "planner.json"
    found = fit_again(out) if again else measure()
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["judged"], indent=1))


if __name__ == "__main__":
    main()
