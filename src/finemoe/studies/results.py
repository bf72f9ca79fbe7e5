"""From finished run directories to results.json, results.csv, report.html and figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

from finemoe.charts.comparison.figures import figures
from finemoe.charts.comparison.page import comparison_page
from finemoe.charts.report import write_report
from finemoe.checkpoint.run_state.state import load_model
from finemoe.core.environment import environment
from finemoe.core.reading import damage_of, require_numbers
from finemoe.generation import Engine, SamplingConfig
from finemoe.model.size import ModelSize, measure
from finemoe.runs.start import resolve_device
from finemoe.studies.arms import ARMS, SizedArm
from finemoe.studies.config import CompareConfig
from finemoe.studies.statistics import CONFIDENCE, interval, paired
from finemoe.studies.study import final_loss
from finemoe.studies.tables import comparison_csv
from finemoe.text import Tokenizer
from finemoe.training.directory import SUMMARY, read_metrics, read_summary
from finemoe.training.report import recent_loss

_SAMPLE_TOKENS = 96
_NEEDED = ("final_validation_loss", "final_training_loss", "bits_per_byte", "training_flops")
_SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=_SAMPLE_TOKENS)
Runs = dict[int, dict[str, Any]]
"""Summaries of an arm's finished runs, by seed."""


def build_results(
    config: CompareConfig,
    arms: Mapping[str, SizedArm],
    directory: Path,
    plan: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    threads: int,
    parallel: int,
    failures: Mapping[str, str],
    command: str,
) -> dict[str, Any]:
    """Everything that results.json holds; only finished runs count."""
    runs = {name: _finished(directory / "arms" / arm.folder, config.seeds) for name, arm in arms.items()}
    finished = {name: found for name, found in runs.items() if found}
    training = {
        name: _training_losses(directory / "arms" / arms[name].folder, found) for name, found in finished.items()
    }
    held_out = {
        name: {seed: run["final_validation_loss"] for seed, run in found.items()} for name, found in finished.items()
    }
    base = measure_all(arms, config.data.sequence_length)
    return {
        "schema": 1,
        "finemoe_version": environment()["packages"]["finemoe"],
        "title": config.title,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "machine": _machine(config, threads, parallel),
        "recipe": config.model_dump(mode="json"),
        "complete": all(len(found) == len(config.seeds) for found in runs.values()),
        "budget": config.budget.model_dump(),
        "notes": [*notes(config, failures), *_training_note(arms, training)],
        "matching": _matching(config),
        "tuning": None if config.tuning is None else _tuning(directory, config, arms),
        "arms": {
            name: _arm(
                directory / "arms" / arms[name].folder,
                arms[name],
                base[name],
                found,
                training[name],
                plan[name],
                tokenizer,
                config.prompts,
            )
            for name, found in finished.items()
        },
        "pairs": _pairs(held_out),
        "training_pairs": _pairs(training),
        "confidence": CONFIDENCE,
    }


def measure_all(arms: Mapping[str, SizedArm], seq_len: int) -> dict[str, ModelSize]:
    """Sizes by arm."""
    return {name: measure(arm.model, seq_len) for name, arm in arms.items()}


def notes(config: CompareConfig, failures: Mapping[str, str]) -> list[str]:
    """How to read the results: gates, capacity, learning rates, failed runs."""
    routing = config.routing
    published = not routing.normalize_gates and routing.route_scale == 1.0
    gates = "as published" if published else "not as published, the same for every learned router"
    capacity = "dropless" if routing.capacity_factor is None else f"capacity factor {routing.capacity_factor:g}"
    lines = [
        f"Gates {gates}: normalize_gates {str(routing.normalize_gates).lower()}, route_scale {routing.route_scale:g}.",
        f"Balance coefficient {routing.balance:g} for learned routers; {capacity}; {routing.hash_table} hash table.",
    ]
    if config.tuning is None:
        rates = "per arm from the recipe" if config.learning_rates else "one for all arms, not tuned per arm"
        lines.append(f"Learning rates: {rates}.")
    else:
        rates = ", ".join(f"{rate:g}" for rate in config.tuning.learning_rates)
        lines.append(
            f"Learning rates: the best of {rates} for each arm, by validation loss after "
            f"{config.tuning.tokens / 1e6:g} M tokens on a seed of its own; equal effort for all."
        )
    lines += [f"Failed: {name}: {message}" for name, message in failures.items()]
    return lines


def write_results(results: dict[str, Any], directory: Path) -> None:
    """results.json, results.csv, report.html, figures/."""
    write_report(directory, results, comparison_page, figures, beside={"results.csv": comparison_csv(results)})


def _finished(directory: Path, seeds: tuple[int, ...]) -> Runs:
    found = {}
    for seed in seeds:
        run = directory / f"seed-{seed}"
        summary = read_summary(run)
        if summary is not None:
            with damage_of(run / SUMMARY, "remove it, and the same command writes it again"):
                require_numbers(summary, _NEEDED)
            found[seed] = {"max_vio": None, "dead_experts": None, **summary}
    return found


def _machine(config: CompareConfig, threads: int, parallel: int) -> dict[str, Any]:
    here = environment()
    device, bf16 = resolve_device(config.training)
    kept = {key: here[key] for key in ("processor", "cores", "memory_gib", "python", "git_revision")}
    return {
        **kept,
        "torch": here["packages"]["torch"],
        "device": device.type,
        "precision": "bf16" if bf16 else "fp32",
        "threads_per_run": threads,
        "parallel_runs": parallel,
    }


def _matching(config: CompareConfig) -> dict[str, Any]:
    width = config.base.feed_forward.ffn_hidden_size
    total, active = config.matching.total_multiple, config.matching.active_multiple
    taken = [name for name in config.arms if name not in ARMS]
    sized = [
        f"One standard feed-forward layer is a SwiGLU of width {width}.",
        f"Mixtures hold {total} of them; Hash and Switch activate 1 a token, GShard and DeepSeekMoE {active}.",
        "As in the paper, Dense, Hash and Switch therefore use fewer FLOPs a token than GShard and DeepSeekMoE.",
    ]
    asis = f"Taken as they are, not sized to the others: {', '.join(taken)}."
    return {
        "reference_width": width,
        "total_multiple": total,
        "active_multiple": active,
        "text": [*(sized if len(taken) < len(config.arms) else []), *([asis] if taken else [])],
    }


def _tuning(directory: Path, config: CompareConfig, arms: Mapping[str, SizedArm]) -> dict[str, Any]:
    """Validation loss of every trial, by arm and rate; None where the trial failed."""
    assert config.tuning is not None
    trials = {}
    for name in arms:
        paths = {rate: directory / "tuning" / arms[name].folder / f"lr-{rate}" for rate in config.tuning.learning_rates}
        trials[name] = {f"{rate:g}": final_loss(path) for rate, path in paths.items()}
    return {"tokens": config.tuning.tokens, "validation_loss": trials}


def _arm(
    directory: Path,
    arm: SizedArm,
    size: ModelSize,
    runs: Runs,
    training: Mapping[int, float],
    plan: Mapping[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
) -> dict[str, Any]:
    first = min(runs)
    dead = [summary["dead_experts"] for summary in runs.values() if summary["dead_experts"] is not None]
    violations = [summary["max_vio"] for summary in runs.values() if summary["max_vio"] is not None]
    return {
        "label": arm.label,
        "directory": f"arms/{arm.folder}",
        "routing": arm.routing,
        "validation_loss": _statistic(runs, "final_validation_loss"),
        "bits_per_byte": _statistic(runs, "bits_per_byte"),
        "training_loss": {**asdict(interval(list(training.values()))), "seeds": list(training.values())},
        "max_vio": asdict(interval(violations)) if violations else None,
        "dead_experts": statistics.fmean(dead) if dead else None,
        "total_parameters": size.total_parameters,
        "active_parameters": size.active_parameters,
        "expert_parameters": size.expert_parameters,
        "active_expert_parameters": size.active_expert_parameters,
        "training_flops": runs[first]["training_flops"],
        "seconds": statistics.fmean(summary["seconds"] for summary in runs.values()),
        "tokens": runs[first]["tokens"],
        "tokens_per_second": statistics.fmean(summary["tokens_per_second"] for summary in runs.values()),
        **_processor(directory, runs),
        "learning_rate": plan["learning_rate"],
        "mismatch": dict(arm.mismatch),
        "paper": None if arm.paper is None else {"name": arm.paper[0], "pile_loss": arm.paper[1]},
        "curve": [point for seed in runs for point in _curve(directory / f"seed-{seed}", seed, size)],
        "load": _load(directory / f"seed-{first}"),
        "samples": _samples(directory / f"seed-{first}", tokenizer, prompts),
    }


def _statistic(runs: Runs, key: str) -> dict[str, Any]:
    values = [summary[key] for summary in runs.values()]
    return {**asdict(interval(values)), "seeds": values}


def _processor(directory: Path, runs: Runs) -> dict[str, float | None]:
    """Processor seconds of training and tokens for each: runs that shared the machine and runs that had it alone alike.

    Nothing for runs of earlier versions, which did not record it.
    """
    used = [_processor_seconds(directory / f"seed-{seed}") for seed in runs]
    totals = [max(steps.values()) for steps in used if steps]
    if len(totals) < len(runs):
        return {"processor_seconds": None, "tokens_per_processor_second": None}
    tokens = [summary["tokens"] for summary in runs.values()]
    speeds = [count / total for count, total in zip(tokens, totals, strict=True) if total]
    return {
        "processor_seconds": statistics.fmean(totals),
        "tokens_per_processor_second": statistics.fmean(speeds) if speeds else None,
    }


def _processor_seconds(run: Path) -> dict[int, float]:
    """Processor seconds of training up to each step; empty where a step did not record them."""
    steps = [record for record in read_metrics(run) if record["kind"] == "step"]
    if any("processor_seconds" not in record for record in steps):
        return {}
    sums = accumulate(record["processor_seconds"] for record in steps)
    return dict(zip((record["step"] for record in steps), sums, strict=True))


def _validations(run: Path) -> list[dict[str, Any]]:
    return [one for one in read_metrics(run) if one["kind"] == "validation" and one.get("validation_loss") is not None]


def _curve(run: Path, seed: int, size: ModelSize) -> list[dict[str, Any]]:
    kept = ("step", "tokens", "seconds", "validation_loss")
    processor = _processor_seconds(run)
    return [
        {
            "seed": seed,
            **{key: record[key] for key in kept},
            "flops": record["tokens"] * size.training_flops_per_token,
            "max_vio": record.get("max_vio"),
            "processor_seconds": processor.get(record["step"]),
        }
        for record in _validations(run)
    ]


def _load(run: Path) -> dict[str, list[float]] | None:
    """Share of assignments of each expert, by layer (from 0, as everywhere), over the validation set, at the end."""
    validations = _validations(run)  # none where its lines are damaged
    load = validations[-1].get("load") if validations else None
    if not load:
        return None
    return {number: [round(count / max(1, sum(layer)), 6) for count in layer] for number, layer in load.items()}


def _samples(run: Path, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[dict[str, str]]:
    """What the arm makes of each prompt. Drawn with a fixed seed: a small model that always takes the likeliest token
    repeats itself, which shows the choice and not the model."""
    engine = Engine(load_model(run), end_of_text_id=tokenizer.end_of_text_id, vocab_size=tokenizer.vocab_size)
    completed = engine.generate([tuple(tokenizer.encode(prompt)) for prompt in prompts], _SAMPLING)
    return [
        {"prompt": prompt, "completion": tokenizer.decode(one.text_ids)}
        for prompt, one in zip(prompts, completed, strict=True)
    ]


def _training_losses(directory: Path, runs: Runs) -> dict[int, float]:
    """Training loss by seed: mean of the last fifth of the steps, at most 100."""
    found = {}
    for seed in runs:
        records = read_metrics(directory / f"seed-{seed}")
        loss = recent_loss([record for record in records if record["kind"] == "step"])
        # Where the lines of the steps are damaged, the summary still has what they came to.
        found[seed] = runs[seed]["final_training_loss"] if loss is None else loss
    return found


def _training_note(arms: Mapping[str, SizedArm], training: Mapping[str, Mapping[int, float]]) -> list[str]:
    """How the arms stand on the text they train on: what held-out text adds in noise, and in memorising."""
    means = {name: statistics.fmean(losses.values()) for name, losses in training.items() if losses}
    if len(means) < 2:
        return []
    order = ", ".join(f"{arms[name].label} {means[name]:.3f}" for name in sorted(means, key=lambda name: means[name]))
    pairs = _pairs(training)
    decided = sum(pair["verdict"] != "undecided" for pair in pairs)
    return [f"Training loss (mean of the last steps, at most 100): {order}; {decided} of {len(pairs)} pairs decided."]


def _pairs(losses: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """Every pair, the later arm of the recipe's list against the earlier one, from losses by arm and seed."""
    pairs = []
    for earlier, later in combinations(losses, 2):
        if not losses[earlier].keys() & losses[later].keys():
            continue
        result = paired(losses[later], losses[earlier])
        difference = result.difference
        pairs.append(
            {
                "a": later,
                "b": earlier,
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "verdict": result.verdict,
                "reason": result.reason,
            }
        )
    return pairs
