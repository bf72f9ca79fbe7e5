"""What a run on many devices will take: `finemoe plan`, from whatever describes a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemoe.analysis.provenance import made_by
from finemoe.charts.report import require_report_folder, write_report
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.parallel.config import Layout, ParallelConfig
from finemoe.parallel.planner.calibration import errors_of
from finemoe.parallel.planner.devices import Device, Precision, find_device
from finemoe.parallel.planner.plan import Calibration, Plan, picture, published_beside, v3_run
from finemoe.parallel.planner.plan import plan as make_plan
from finemoe.parallel.planner.search import search as search_layouts
from finemoe.parallel.planner.setup import When
from finemoe.runs.planning.advice import Ask, Request, nothing_fits, options_of, require_fit
from finemoe.runs.planning.asked import Options, Question, question
from finemoe.runs.planning.measured import HERE, here

_MOST_SPANS = 20_000
ANOTHER = " --stage NAME plans another."


def plan(
    model: str | os.PathLike[str] | ModelConfig,
    gpus: int,
    device: str = "h100",
    *,
    stage: str | None = None,
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
        model: what `finemoe.size` takes; of a recipe all counts that the trainer would do, its defaults included.
        gpus: devices, a process each.
        device: one of `parallel.planner.devices.DEVICES`, or "here": this machine, measured now.
        stage: of a recipe with stages; None: the first that trains.
        overrides: `parallel.expert=64` and the like; of a recipe any key.
        tokens_per_step: of all devices; None: the recipe's, and of a model alone 8 micro-batches a device.
        micro_batch, seq_len: sequences of a device at once, tokens of each; None: the recipe's; of a model alone one.
        tokens: of the whole run, for device-hours.
        precision: of products; None: bf16, and fp32 here or where the recipe says so.
        recompute: whether blocks run forward twice.
        gather: how often weights are gathered and gradients summed: each micro-batch, or once a step.
        calibration: whose times: torch, tuned or deepseek-v3.
        search: rank the layouts that finemoe trains by, instead of taking `[parallel]`.
        refuse: raise where it does not fit, or where finemoe does not train by it. With a calibration other than torch,
            which is for others' software, the latter is told and not raised.
        out: folder for results.json, report.html and figures.

    Returns:
        What results.json holds.

    Raises:
        ConfigError: no such layout, device or key; one that finemoe does not train by, or that does not fit.
    """
    folder = require_report_folder(out, "plan")
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: at least one")
    found = here(gpus) if device == "here" else find_device(device)
    precision = precision or ("fp32" if device == "here" else None)
    options = Options(tokens_per_step, micro_batch, seq_len, tokens, recompute, precision, gather)
    request = Request(gpus, options, tuple(overrides))

    def ask(request: Request) -> Question:
        return question(model, request.gpus, request.overrides, request.options, stage)

    results = _answered(request, ask, found, calibration, search, refuse)
    if folder is not None:
        _write(folder, results)
    return results


def _answered(
    request: Request, ask: Ask, device: Device, calibration: Calibration, search: bool, refuse: bool
) -> dict[str, Any]:
    """What results.json holds; arguments as of `plan`."""
    asked = ask(request)
    if search:
        ranked, made = _searched(asked, request, ask, device, calibration)
    else:
        ranked, made = _laid_out(asked, request.gpus, device, calibration, refuse and calibration == "torch")
    if refuse:
        require_fit(made, request, ask)
    beside = _beside(asked.config.model, made)
    return {"kind": "plan", **made.to_dict(), **ranked, "notes": _notes(asked), **beside, **made_by()}


def _notes(asked: Question) -> list[str]:
    """What a reader must know of the run that is planned."""
    notes = []
    if asked.stage is not None:
        notes.append(f"This is {asked.stage}.{ANOTHER}")
    if asked.config.method.kind == "grpo":
        notes.append(
            "This is the update of GRPO alone: a step takes longer by the time of writing its answers and judging "
            "them, which `finemoe train --check` measures."
        )
    return notes


def _write(folder: Path, results: dict[str, Any]) -> None:
    from finemoe.charts.plan.figures import figures
    from finemoe.charts.plan.page import plan_page

    write_report(folder, results, plan_page, figures)


def _laid_out(
    asked: Question, gpus: int, device: Device, calibration: Calibration, refuse: bool
) -> tuple[dict[str, Any], Plan]:
    """By `[parallel]`, and what finemoe says to it where it does not train by it; raised where it is to `refuse`."""
    layout, refused = asked.layout(gpus), None
    try:
        asked.refuse(layout)
    except ConfigError as error:
        if refuse:
            raise
        refused = str(error)
    made = make_plan(
        asked.config.model,
        asked.setup(layout, device.name == "here"),
        device,
        **_options(asked, device, calibration),
    )
    return {"refused": refused}, made


def _options(asked: Question, device: Device, calibration: Calibration) -> dict[str, Any]:
    """What `plan` and `search` take alike, this machine's own constants and allowance among them."""
    return {"name": asked.name, "tokens": asked.tokens, "calibration": calibration, **HERE.options(device.name)}


def _searched(
    asked: Question, request: Request, ask: Ask, device: Device, calibration: Calibration
) -> tuple[dict[str, Any], Plan]:
    if asked.config.parallel != ParallelConfig():
        raise ConfigError("--search ranks layouts itself: leave [parallel] and --set parallel.* out")
    found = search_layouts(
        asked.config.model,
        asked.setup(Layout(), device.name == "here"),
        request.gpus,
        device,
        refuse=asked.refuse,
        **_options(asked, device, calibration),
    )
    if not found.plans:
        raise ConfigError(nothing_fits(found.nearest, request, ask, device, calibration))
    rows = [
        {
            "layout": str(one.setup),
            "seconds": one.seconds.value,
            "tokens_per_second": one.rate.value,
            "memory": one.peak.total,
            "memory_uneven": one.uneven.total,
            "fits_uneven": one.uneven.total <= device.memory,
            "bubble": one.bubble,
            "parallel": {
                key: getattr(one.setup, key)
                for key in ("pipeline", "replicate", "shard", "expert", "context", "schedule")
            },
            "options": options_of(one.setup),
            "recompute": one.setup.recompute,
            "gather": one.setup.gather,
        }
        for one in found.plans
    ]
    told = {"tried": found.tried, "fitting": found.fitting, "impossible": found.impossible, "ranked": rows}
    return {"search": told, "refused": None}, found.plans[0]


def _beside(config: ModelConfig, made: Plan) -> dict[str, Any]:
    """What a page shows beside the plan: the time line of a step, and what others published."""
    line = picture(config, made, HERE.options(made.device.name).get("constants"))
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
