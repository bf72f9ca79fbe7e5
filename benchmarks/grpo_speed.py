"""How fast GRPO is: its rollouts beside the bare engine, and the whole of it beside TRL's GRPOTrainer.

    make bench-grpo TRL=/path/to/python
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.grpo_speed --trl /path/to/python   # the same
    python -m benchmarks.grpo_speed --quick      # a minute, small models: to see that everything works

Results go to benchmarks/results/grpo-speed.json. `--trl` is a Python that has TRL, transformers and torch; the
environment's FINEMOE_TRL where it is not given. Everything runs on one thread, in float32, on the CPU.

`rollouts`: tokens a second of GRPO's own source of answers (`methods/grpo/source.py`), which tells experts and
log-probabilities, over those of the engine given the same requests, without experts. Prompts are read once for a group
of 16 by both, 32 sequences are written at once, and all answers are of one length. In turn, in both orders.

`whole`: a dense model learns the running sum as the stages `student-steps` and `student` of recipes/reasoning.toml have
it, and is exported. From that folder finemoe and TRL train, each in a process of its own and one step at a time in
turn, on the same prompts in the same order, told whether the last number is the right one, with the same settings
(`SETTINGS`), until the mean reward of three steps is 0.9: a row a seed. TRL generates by transformers, as on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.grpo_own import recipe
from benchmarks.speed import shapes
from benchmarks.speed.process import Peer, interpreter_with
from benchmarks.speed.table import Measured, Row, show
from benchmarks.speed.timing import Contestant, interleave, ratios

from finemoe.checkpoint.huggingface.exporting import export_hf
from finemoe.core.config import read_tables
from finemoe.core.environment import environment
from finemoe.core.memory import keep_freed_pages
from finemoe.generation import Engine, Request, SamplingConfig
from finemoe.generation.runner import cache_bytes
from finemoe.methods.grpo.source import Asked, OwnEngine
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.runs.config import resolve_run
from finemoe.runs.start import build_method
from finemoe.studies.stages import run_stages
from finemoe.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "grpo-speed.json"
RECIPE = HERE.parent / "recipes" / "reasoning.toml"
STAGES = ("student-steps", "student")
PARTS = ("rollouts", "whole")
GROUP, AT_ONCE = 16, 32
GOAL, OVER, WARM = 0.9, 3, 2
"""The mean reward of `OVER` steps that ends a run; steps that the rate leaves out."""
SETTINGS: dict[str, Any] = {
    "answers": 128, "group": GROUP, "answer_tokens": 20, "temperature": 1.0, "beta": 0.04, "clip": 0.2,
    "learning_rate": 2e-5, "betas": [0.9, 0.95], "eps": 1e-8, "max_gradient_norm": 1.0, "sequence_length": 32,
}  # fmt: skip
"""Of both sides: DeepSeekMath's loss, AdamW without decay, one step on each answer. The rate is a fifth of that of
recipes/reasoning.toml, by which the goal was reached in a second: too soon to say who is there first."""


@dataclass
class Found:
    """What a run of the benchmark says."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


# ---- rollouts beside the bare engine ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ids:
    """What the source of answers asks of a tokenizer."""

    vocab_size: int
    end_of_text_id: int = 0
    stop_ids: frozenset[int] = frozenset({0})


def rollout_models(quick: bool) -> dict[str, ModelConfig]:
    """A dense model and a mixture of about as many active weights, both of hidden size 256; `quick`: of 64."""
    hidden, layers = (64, 1) if quick else (256, 4)
    shared = {
        "vocab_size": 512 if quick else 4096,
        "hidden_size": hidden,
        "num_layers": layers,
        "attention": shapes.grouped_query(hidden // 64, hidden // 64),
    }
    width = hidden * 11 // 16
    kinds = {"dense": shapes.dense(5 * width), "mixture": shapes.moe(16, width, 4)}
    return {name: shapes.model_config({**shared, "feed_forward": one}) for name, one in kinds.items()}


def by_source(model: Transformer, ids: _Ids, asked: Sequence[Asked], sampling: SamplingConfig) -> list[tuple[int, ...]]:
    """The answers, as GRPO gets them."""
    source = OwnEngine(model, ids, torch.inference_mode, at_once=AT_ONCE)  # type: ignore[arg-type]
    return [one.completion for group in source(asked, sampling) for one in group]


def by_engine(model: Transformer, ids: _Ids, asked: Sequence[Asked], sampling: SamplingConfig) -> list[tuple[int, ...]]:
    """The answers of the engine alone: as many at once, in as large a cache, prompts shared in the same way."""
    lengths = sorted(len(one.ids) + sampling.max_new_tokens for one in asked for _ in one.streams)
    engine = Engine(
        model.eval(),
        end_of_text_id=ids.end_of_text_id,
        stop_ids=ids.stop_ids,
        vocab_size=ids.vocab_size,
        cache_bytes=cache_bytes(model, lengths[-AT_ONCE:]),
        max_sequences=min(AT_ONCE, len(lengths)),
        max_tokens=512,
    )
    numbers: list[int] = []
    for one in asked:
        first: int | None = None
        for stream in one.streams:
            numbers.append(engine.submit(Request(one.ids, sampling, repetition=stream, parent=first)))
            first = numbers[-1] if first is None else first
    done = {event.sequence.id: event.sequence for event in engine.events() if event.finish_reason is not None}
    return [tuple(done[number].completion) for number in numbers]


def rollouts(found: Found, quick: bool, repeats: int) -> None:
    """A row for each model.

    Raises:
        RuntimeError: both do not write as many tokens.
    """
    groups, prompt, count = (2, 8, 4) if quick else (8, 64, 64)
    sampling = SamplingConfig(seed=1, max_new_tokens=count, ignore_end=True)
    for name, config in rollout_models(quick).items():
        model, ids = shapes.build(config).eval(), _Ids(config.vocab_size)
        asked = [
            Asked(tuple(one), tuple(range(number * GROUP, (number + 1) * GROUP)))
            for number, one in enumerate(shapes.token_ids(config, groups, prompt))
        ]
        tokens = groups * GROUP * count
        ways = {"GRPO": by_source, "engine": by_engine}
        texts = {way: write(model, ids, asked, sampling) for way, write in ways.items()}
        if any(sum(map(len, one)) != tokens for one in texts.values()):
            raise RuntimeError(f"{name}: not every answer is of {count} tokens, so that no rates can be compared")
        same = sum(a == b for a, b in zip(*texts.values(), strict=True)) / len(texts["GRPO"])

        def timed(write: Any, model: Transformer = model, ids: _Ids = ids, asked: list[Asked] = asked) -> float:
            begun = time.perf_counter()
            write(model, ids, asked, sampling)
            return time.perf_counter() - begun

        contestants = [Contestant(way, lambda write=write: timed(write)) for way, write in ways.items()]  # type: ignore[misc]
        seconds = interleave(contestants, repeats)
        rates = {way: [tokens / one for one in each] for way, each in seconds.items()}
        sides = (Measured(way, rates[way], "tokens/s") for way in ways)
        what = f"rollouts, {name}, {AT_ONCE} at once / engine"
        values = ratios(rates["GRPO"], rates["engine"])
        found.rows.append(Row("rollouts", what, *sides, values, higher=True, target=0.8))
        found.details[name] = {"model": config.model_dump(mode="json"), "parameters": parameters(model),
                               "answers": groups * GROUP, "tokens": [prompt, count], "same_answers": same}  # fmt: skip


def parameters(model: Transformer) -> int:
    """How many weights."""
    return sum(one.numel() for one in model.parameters())


# ---- the whole of GRPO beside TRL -------------------------------------------------------------------------------


def student(folder: Path, quick: bool, width: int) -> Path:
    """The model that both begin with, as a Hugging Face folder; made once.

    Args:
        folder: of its runs.
        quick: a few steps, after which it knows nothing.
        width: hidden size; the rest in proportion to the recipe's, which has 32.
    """
    out = folder / "exported"
    if out.exists():
        return out
    raw = read_tables(RECIPE)
    stages = {one["name"]: one for one in raw["stage"]}
    first, second = (dict(stages[name]) for name in STAGES)
    first["model"] = {
        **first["model"],
        "hidden_size": width,
        "attention": {**first["model"]["attention"], "head_dim": width // 2},
        "feed_forward": {"kind": "dense", "ffn_hidden_size": width * 11 // 4},
    }
    if quick:
        for one in (first, second):
            one["training"] = {**one["training"], "steps": 5}
            one["data"] = {**one["data"], "corpus": {**one["data"]["corpus"], "count": 1000}}
    shared = {name: value for name, value in raw.items() if name not in ("stage", "study")}
    # Of this seed's student 28 % of the answers still have steps; of seed 0's none, and RL has nothing to amplify.
    told = ["seed=4"]
    done = run_stages({**shared, "stage": [first, second]}, out=folder / "stages", overrides=told, quiet=True)
    export_hf(done[-1]["folder"], out, family="llama", quiet=True)
    return out


def job_of(model: Path, seed: int, steps: int, quick: bool) -> dict[str, Any]:
    """What both sides are told: settings, and prompts in the order in which they are asked."""
    changed = {"answers": 32} if quick else {}
    count = 200 if quick else 4_000
    job: dict[str, Any] = {
        "model": str(model.resolve()),
        "seed": seed,
        "corpus": {"kind": "problems", "problem": "running_sum", "count": count, "seed": seed},
        "settings": {**SETTINGS, **changed, "steps": steps},
    }
    method = build_method(resolve_run(recipe(job), "the benchmark"))
    words = Tokenizer.load(model / "tokenizer.json")
    job["prompts"] = [
        {"text": words.decode(one.ids), "ids": list(one.ids), "right": one.right[0]} for one in method.asks()
    ]
    method.close()
    return job


Steps = list[dict[str, Any]]


def mean_reward(steps: Steps) -> float:
    """Of the last `OVER` steps; 0 before there are as many."""
    return sum(one["reward"] for one in steps[-OVER:]) / OVER if len(steps) >= OVER else 0.0


def reached(steps: Steps) -> tuple[int, float] | None:
    """Steps, and seconds of all of them, until `mean_reward` first was the goal."""
    at = next((n for n in range(OVER, len(steps) + 1) if mean_reward(steps[:n]) >= GOAL), None)
    return None if at is None else (at, sum(one["seconds"] for one in steps[:at]))


def race(job: Mapping[str, Any], peers: Mapping[str, Peer], least: int) -> dict[str, Steps]:
    """Steps of all in turn, in one order and then in the other; each until its goal, or the end of its steps.

    Args:
        job: as both were told.
        peers: by name.
        least: steps of each, even where it is there before.

    Raises:
        RuntimeError: a side was asked other prompts than it should have been.
    """
    settings, prompts = job["settings"], job["prompts"]
    per_step = settings["answers"] // settings["group"]
    found: dict[str, Steps] = {name: [] for name in peers}
    for number in range(settings["steps"]):
        at = [(number * per_step + one) % len(prompts) for one in range(per_step)]
        read = sum(len(prompts[one]["ids"]) for one in at) * settings["group"]
        for name in peers if number % 2 == 0 else reversed(peers):
            if len(found[name]) >= least and reached(found[name]) is not None:
                continue
            one = peers[name].ask("step")
            if one.pop("prompts", sorted(at)) != sorted(at):
                raise RuntimeError(f"{name} was asked other prompts in step {number + 1} than {at}")
            found[name].append({**one, "tokens": read + one["answer_tokens"]})
        if all(len(steps) <= number for steps in found.values()):
            break
    return found


def whole(found: Found, folder: Path, python: str, wanted: argparse.Namespace) -> None:
    """Rows of every seed, and of all."""
    quick = wanted.quick
    folder = folder / ("quick" if quick else f"width-{wanted.width}")
    model = student(folder, quick, wanted.width)
    found.details["whole"] = {"settings": SETTINGS, "goal": [GOAL, OVER], "seeds": {}}
    for seed in range(wanted.seeds):
        job = job_of(model, seed, 2 if quick else wanted.steps, quick)
        place = folder / f"job-{seed}.json"
        place.write_text(json.dumps(job), encoding="utf-8")
        steps, told = _raced(job, place, python, 2 if quick else 10)
        found.details["whole"]["seeds"][seed] = {"sides": told, "steps": steps}
        found.rows.append(rate_row(seed, steps, 0 if quick else WARM))
        arrived = {name: reached(one) for name, one in steps.items()}
        for name, one in arrived.items():
            told[name]["reached"] = one
            if one is None:
                last = f"{mean_reward(steps[name]):.2f}"
                found.notes.append(f"seed {seed}: {name} was at {last} after {len(steps[name])} steps, not at {GOAL}")
            else:
                found.notes.append(f"seed {seed}: {name} was there after {one[0]} steps and {one[1]:.1f} seconds")
        found.rows += goal_rows(seed, arrived)
        size = told["finemoe"]["parameters"]
    found.notes.append(f"whole: a dense Llama of {size:,} parameters, hidden size {wanted.width}")


def _raced(job: Mapping[str, Any], place: Path, python: str, least: int) -> tuple[dict[str, Steps], dict[str, Any]]:
    """Both sides of one seed: their steps, and what they say of themselves."""
    alone = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place.resolve().parent / "cache")}
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sides = {
        "finemoe": ([sys.executable, "-m", "benchmarks.grpo_own", str(place.resolve())], {**os.environ, **alone}),
        "TRL": ([python, "-m", "benchmarks.grpo_trl", str(place.resolve())], {**outside, **alone, **offline}),
    }
    told: dict[str, Any] = {}
    peers: dict[str, Peer] = {}
    try:
        for name, (command, around) in sides.items():
            begun = time.perf_counter()
            peers[name] = Peer(name, command, around)
            told[name] = {**peers[name].ready, "start_seconds": time.perf_counter() - begun}
        return race(job, peers, least), told
    finally:
        for peer in peers.values():
            peer.close()


def rate_row(seed: int, steps: Mapping[str, Steps], warm: int) -> Row:
    """Tokens a second of the steps that both did, but for the first `warm`."""
    shared = min(map(len, steps.values()))
    rates = {name: [one["tokens"] / one["seconds"] for one in each[warm:shared]] for name, each in steps.items()}
    sides = (Measured(name, rates[name], "tokens/s") for name in ("finemoe", "TRL"))
    values = ratios(rates["finemoe"], rates["TRL"])
    return Row("whole", f"GRPO, seed {seed}, tokens a second / TRL", *sides, values, higher=True)


def goal_rows(seed: int, arrived: Mapping[str, tuple[int, float] | None]) -> list[Row]:
    """Seconds until the goal, where both came there; how many steps these were stands beside them."""
    ours, theirs = arrived["finemoe"], arrived["TRL"]
    if ours is None or theirs is None:
        return []
    what = f"seconds to {GOAL}, seed {seed}, TRL / finemoe"
    sides = (Measured(name, [at[1]]) for name, at in (("finemoe", ours), ("TRL", theirs)))
    note = f"{ours[0]} and {theirs[0]} steps"
    return [Row("whole", what, *sides, [theirs[1] / ours[1]], higher=True, note=note)]


# ---- the command line -------------------------------------------------------------------------------------------


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and two steps")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; all without it")
    parser.add_argument("--trl", default=os.environ.get("FINEMOE_TRL"), help="a Python that has TRL")
    parser.add_argument("--repeats", type=int, default=7, help="of the rollouts, in turn; 7")
    parser.add_argument("--seeds", type=int, default=4, help="of the whole of GRPO; 4")
    parser.add_argument("--steps", type=int, default=300, help="at most, of each side and seed; 300")
    parser.add_argument("--width", type=int, default=32, help="hidden size of the dense model; 32, the recipe's")
    parser.add_argument("--runs", type=Path, default=Path("runs/grpo-speed"), help="where that model is kept")
    parser.add_argument("--out", type=Path, help=f"where to write; {RESULTS} of a whole run")
    wanted = parser.parse_args(given)
    for name, least in (("repeats", 1), ("seeds", 1), ("steps", WARM + OVER)):
        if getattr(wanted, name) < least:
            parser.error(f"--{name} {getattr(wanted, name)}: give {least} or more")
    if wanted.quick:
        wanted.repeats, wanted.seeds = 1, 1
    return wanted


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    wanted = arguments(sys.argv[1:] if given is None else given)
    torch.set_num_threads(1)
    keep_freed_pages()  # as `finemoe train` has it
    found, begun, load = Found(), time.perf_counter(), os.getloadavg()
    parts = wanted.only or list(PARTS)
    if "rollouts" in parts:
        rollouts(found, wanted.quick, wanted.repeats)
    python = interpreter_with("trl", [wanted.trl]) if wanted.trl and "whole" in parts else None
    if python is not None:
        whole(found, wanted.runs, python, wanted)
    elif "whole" in parts:
        found.notes.append("the whole of GRPO was left out: --trl names no Python that has trl")
    seconds = time.perf_counter() - begun
    title = f"GRPO, one thread, {seconds / 60:.0f} min" + (" (quick: these are no results)" if wanted.quick else "")
    show(found.rows, [], {}, found.notes, title)
    results = {
        "date": time.strftime("%Y-%m-%d"), "machine": environment(), "threads": 1, "seconds": round(seconds),
        "load_average": {"before": load, "after": os.getloadavg()}, "quick": wanted.quick,
        "rows": [row.to_dict({}) for row in found.rows], "notes": found.notes, "details": found.details,
    }  # fmt: skip
    full = python is not None and set(parts) == set(PARTS) and not wanted.quick
    place = wanted.out or (RESULTS if full else None)
    if place is not None:
        place.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(place)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
