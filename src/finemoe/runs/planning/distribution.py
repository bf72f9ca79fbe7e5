"""What a run on many devices will take: `finemoe plan`, from whatever describes a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemoe.analysis.provenance import made_by
from finemoe.charts.report import require_report_folder, write_report
from finemoe.core.config import parse, with_overrides
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.parallel.config import ParallelConfig
from finemoe.parallel.planner.calibration import errors_of
from finemoe.parallel.planner.devices import Device, Precision, find_device
from finemoe.parallel.planner.plan import Calibration, Plan, picture, published_beside, require_fit, v3_run
from finemoe.parallel.planner.plan import plan as make_plan
from finemoe.parallel.planner.search import search as search_layouts
from finemoe.parallel.planner.setup import Setup, When
from finemoe.runs.planning.measured import HERE, here
from finemoe.runs.planning.sizing import Described, describe

_SEQUENCES_A_DEVICE = 8
"""Of a step, where nobody says how many."""
_KEYS = {
    "parallel": None,
    "training": {"tokens_per_step", "micro_batch_tokens"},
    "data": {"sequence_length"},
    "kernels": {"recompute"},
}
_STATE_BYTES = {"adamw": 8, "muon": 4}
_MOST_SPANS = 20_000


@dataclass(frozen=True)
class _Question:
    """A run to be planned."""

    name: str
    described: Described
    parallel: ParallelConfig
    rest: Mapping[str, Any]
    """Of `Setup`, all that a layout does not say."""
    tokens: float | None


def plan(
    model: str | os.PathLike[str] | ModelConfig,
    gpus: int,
    device: str = "h100",
    *,
    overrides: Sequence[str] = (),
    tokens_per_step: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
    tokens: float | None = None,
    precision: Precision | None = None,
    recompute: bool | None = None,
    gather: When = "micro_batch",
    calibration: Calibration = "torch",
    search: bool = False,
    refuse: bool = True,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Memory, traffic, bubble and time of a run on `gpus` devices, from configuration alone; nothing is allocated.

    Args:
        model: what `finemoe.size` takes; of a recipe, batch, length, recompute and `[parallel]` count.
        gpus: devices, a process each.
        device: one of `parallel.planner.devices.DEVICES`, or "here": this machine, measured now.
        overrides: `parallel.expert=64` and the like.
        tokens_per_step: of all devices; 8 sequences a device where nobody says.
        micro_batch, seq_len: sequences of a device at once, one where nobody says; tokens of each.
        tokens: of the whole run, for device-hours.
        precision: of products; None: bf16, and fp32 here.
        recompute: whether blocks run forward twice.
        gather: how often weights are gathered and gradients summed: each micro-batch, or once a step.
        calibration: whose times: torch, tuned or deepseek-v3.
        search, refuse: rank layouts instead of taking `[parallel]`; raise where it does not fit.
        out: folder for results.json, report.html and figures.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: a layout that cannot be or does not fit, with the bytes; an unknown device or key.
    """
    folder = require_report_folder(out, "plan")
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one")
    found = here(gpus) if device == "here" else find_device(device)
    asked = {
        "tokens_per_step": tokens_per_step, "micro_batch": micro_batch, "seq_len": seq_len, "tokens": tokens,
        "recompute": recompute, "precision": precision or ("fp32" if device == "here" else "bf16"), "gather": gather,
    }  # fmt: skip
    question = _question(model, gpus, overrides, asked)
    ranked, made = (_searched if search else _laid_out)(question, gpus, found, calibration)
    if refuse:
        require_fit(made)
    results = {"kind": "plan", **made.to_dict(), **ranked, **_beside(question.described.config, made), **made_by()}
    if folder is not None:
        from finemoe.charts.plan.figures import figures
        from finemoe.charts.plan.page import plan_page

        write_report(folder, results, plan_page, figures)
    return results


def _laid_out(question: _Question, gpus: int, device: Device, calibration: Calibration) -> tuple[dict[str, Any], Plan]:
    setup = Setup.of(question.parallel.layout(gpus), **question.rest)
    options: dict[str, Any] = {"name": question.name, "calibration": calibration, **HERE.options(device.name)}
    return {}, make_plan(question.described.config, setup, device, tokens=question.tokens, **options)


def _searched(question: _Question, gpus: int, device: Device, calibration: Calibration) -> tuple[dict[str, Any], Plan]:
    if question.parallel != ParallelConfig():
        raise ConfigError("--search ranks layouts itself: leave [parallel] and --set parallel.* out")
    start = Setup(**{**question.rest, "shard": 1, "sequences": question.rest["sequences"]})
    name, tokens = question.name, question.tokens
    found = search_layouts(
        question.described.config, start, gpus, device, name=name, tokens=tokens, calibration=calibration
    )
    rows = [
        {
            "layout": str(one.setup),
            "seconds": one.seconds.value,
            "tokens_per_second": one.rate.value,
            "memory": one.peak.total,
            "bubble": one.bubble,
            "parallel": {
                key: getattr(one.setup, key)
                for key in ("pipeline", "replicate", "shard", "expert", "context", "schedule")
            },
            "recompute": one.setup.recompute,
            "gather": one.setup.gather,
        }
        for one in found.plans
    ]
    told = {"tried": found.tried, "fitting": found.fitting, "impossible": found.impossible, "ranked": rows}
    return {"search": told}, found.plans[0]


def _question(
    model: str | os.PathLike[str] | ModelConfig, gpus: int, overrides: Sequence[str], asked: Mapping[str, Any]
) -> _Question:
    over = with_overrides({}, overrides)
    _require_known(over)
    length = asked["seq_len"] or over.get("data", {}).get("sequence_length")
    described = describe(model, length)
    training = {**described.recipe.get("training", {}), **over.get("training", {})}
    kernels = {**described.recipe.get("kernels", {}), **over.get("kernels", {})}
    parallel = {**described.recipe.get("parallel", {}), **over.get("parallel", {})}
    seq_len = described.seq_len
    micro = asked["micro_batch"] or max(1, (training.get("micro_batch_tokens") or 0) // seq_len)
    step = asked["tokens_per_step"] or training.get("tokens_per_step") or _SEQUENCES_A_DEVICE * micro * gpus * seq_len
    if step % seq_len:
        raise ConfigError(f"{step:,} tokens a step are no multiple of sequences of {seq_len:,} tokens")
    recompute = kernels.get("recompute", False) if asked["recompute"] is None else asked["recompute"]
    optimizer = described.recipe.get("optimizer", {}).get("kind", "adamw")
    tokens = asked["tokens"] or training.get("tokens")
    if tokens is None and training.get("steps"):
        tokens = training["steps"] * step
    name = "model" if isinstance(model, ModelConfig) else os.fspath(model)
    rest = {
        "sequences": step // seq_len, "seq_len": seq_len, "micro_batch": micro, "precision": asked["precision"],
        "recompute": bool(recompute), "gather": asked["gather"], "reduce": asked["gather"],
        "state_bytes": _STATE_BYTES.get(optimizer, 8),
    }  # fmt: skip
    return _Question(name, described, parse(ParallelConfig, parallel, "[parallel]", table="parallel"), rest, tokens)


def _require_known(over: Mapping[str, Any]) -> None:
    for table, value in over.items():
        keys = _KEYS.get(table, set())
        if keys is not None and (not isinstance(value, Mapping) or set(value) - keys):
            known = ", ".join(f"{name}.{key}" for name, inner in _KEYS.items() for key in sorted(inner or {"*"}))
            raise ConfigError(f"--set {table}: a plan takes {known}; write all else into a recipe, and plan that")
        if keys is None and not isinstance(value, Mapping):
            raise ConfigError(f"--set {table}: write it as {table}.expert=64")


def _beside(config: ModelConfig, made: Plan) -> dict[str, Any]:
    """What a page shows beside the plan: the time line of a step, and what others published."""
    line = picture(config, made)
    spans = [
        {"rank": span.rank, "start": span.start, "end": span.end,
         "kind": "FB" if len(span.work) == 2 else span.work[0].kind, "micro_batch": span.work[0].micro_batch}
        for span in (line.spans if line is not None else ())
    ][:_MOST_SPANS]  # fmt: skip
    shown = len({span["micro_batch"] for span in spans})
    return {
        "timeline": {"spans": spans, "micro_batches": shown},
        "published": published_beside(made.device),
        "v3_run": v3_run(),
        "judged": {family: errors_of(family).to_dict() for family in ("hopper", "blackwell")},
    }
