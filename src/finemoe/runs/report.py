"""A page for one run, live and after: what its directory says, as a report. Nothing here touches the run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finemoe.charts.report import require_report_folder, write_report
from finemoe.core.environment import environment
from finemoe.core.errors import FinemoeError
from finemoe.core.locks import is_held
from finemoe.core.logs import logger
from finemoe.core.reading import damage_of, read_object
from finemoe.training.directory import read_if_there, read_metrics, read_summary, require_run

MOST_POINTS = 400
"""Points of a curve: of longer runs, each is the mean of several steps."""
REFRESH = 15
"""Seconds between two pages of a run that trains."""
_AVERAGED = ("loss", "tokens_per_second", "gradient_norm")
_KINDS = ("step", "validation", "alert", "warning")
_SAMPLE_TOKENS = 80
_PATIENCE = 60  # seconds without a run: it reads its corpus before it has a directory, and one is resumed in a while


def run_results(directory: Path, *, refresh: int | None = None, samples: int = 0) -> dict[str, Any]:
    """What results.json of a run's page holds.

    Args:
        directory: of a run that trains, was interrupted or is finished.
        refresh: seconds after which a browser opens the page of a run that trains again; never when None.
        samples: how many texts the newest checkpoint writes.

    Raises:
        RunError: not a run directory, or one that cannot be read.
    """
    require_run(directory)
    config = _config(directory / "config.json")
    metrics = directory / "metrics.jsonl"
    records = read_metrics(directory) if metrics.exists() else []
    of = {kind: [one for one in records if one.get("kind") == kind] for kind in _KINDS}
    summary = read_summary(directory)
    each = -(-len(of["step"]) // MOST_POINTS) or 1
    load, load_of = _load(of["validation"], of["step"])
    drawn, sampled_at = _samples(directory, samples)
    running = is_held(directory / ".lock")
    data = read_if_there(directory / "data.json") or {}
    return {
        "kind": "run",
        "finemoe_version": environment()["packages"]["finemoe"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "directory": str(directory),
        "name": str(config.get("name") or directory.name),
        "finished": summary is not None,
        "summary": summary,
        "running": running,
        "failure": _failure(directory, of["step"]) if summary is None and not running else None,
        "total_steps": _total_steps(config.get("training") or {}),
        "max_tokens": _max_tokens(config.get("training") or {}),
        "steps_per_point": each,
        "steps": thinned(of["step"], each),
        "validations": [{key: value for key, value in one.items() if key != "load"} for one in of["validation"]],
        "load": load,
        "load_of": load_of,
        "alerts": sorted([*of["alert"], *of["warning"]], key=lambda one: one["step"]),
        "samples": drawn,
        "sampled_at": sampled_at,
        "refresh": refresh,
        "config": config,
        "environment": read_if_there(directory / "environment.json") or {},
        "data": {key: value for key, value in data.items() if key not in ("skipped", "domains")},
    }


def run_report(
    directory: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    follow: bool = False,
    samples: int = 3,
    every: int = REFRESH,
) -> dict[str, Any]:
    """Write the page of a run to the folder `out`; `finemoe show RUN --out` calls it.

    Args:
        directory: of a run that trains, was interrupted or is finished.
        out: made where it does not exist; an earlier page of a run is written over.
        follow: write it again every `every` seconds until the run is finished, has failed, or was stopped and nothing
            is at work there for a minute; Ctrl-C ends it sooner.
        samples: how many texts the newest checkpoint writes, once the run does not train any more.
        every: seconds.

    Returns:
        What results.json holds.

    Raises:
        RunError: not a run directory (a followed one may begin within a minute), or `out` holds something else.
    """
    run = Path(directory)
    waited = 0
    while follow and waited < _PATIENCE and not (run / "config.json").exists():
        if not waited:
            logger.info("waiting for a run to begin in %s", run)
        _pause(1)
        waited += 1
    require_run(run)
    folder = require_report_folder(out, "run")
    assert folder is not None
    still = 0
    try:
        while follow:
            results = run_results(run, refresh=every)
            still = 0 if results["running"] else still + every
            if results["finished"] or results["failure"] or still > _PATIENCE:
                break
            _write(folder, results, drawn=False)
            _pause(every)
    except KeyboardInterrupt:
        logger.info("not followed any more; the run itself goes on")
    results = run_results(run, samples=samples)
    _write(folder, results, drawn=True)
    return results


def thinned(steps: Sequence[Mapping[str, Any]], each: int) -> list[dict[str, Any]]:
    """One point for every `each` steps: the last of them, with the means of what varies from step to step."""
    points = []
    for start in range(0, len(steps), each):
        group = steps[start : start + each]
        means = {
            key: sum(one[key] for one in group) / len(group)
            for key in _AVERAGED
            if all(one.get(key) is not None for one in group)
        }
        point = {**group[-1], **means}
        layers = point.get("max_vio_per_layer")
        if layers:
            known = [one["max_vio_per_layer"] for one in group if "max_vio_per_layer" in one]
            found = {layer: [one[layer] for one in known if layer in one] for layer in layers}
            point["max_vio_per_layer"] = {layer: sum(values) / len(values) for layer, values in found.items()}
        kept = ("step", "tokens", "seconds", "learning_rate", "max_vio_per_layer", *_AVERAGED)
        points.append({key: point[key] for key in kept if key in point} | _figures(group))
    return points


def _figures(group: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means of the terms, and of what a method says beside them; nothing where it says nothing."""
    each = [{**one.get("terms", {}), **one["figures"]} for one in group if one.get("figures")]
    if not each:
        return {}
    known = {name: [one[name] for one in each if name in one] for name in each[-1]}
    return {"figures": {name: sum(values) / len(values) for name, values in known.items()}}


def _write(folder: Path, results: Mapping[str, Any], *, drawn: bool) -> None:
    from finemoe.charts.run.figures import figures  # altair takes a while
    from finemoe.charts.run.page import run_page

    write_report(folder, results, run_page, figures if drawn else lambda _: {})


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _config(path: Path) -> dict[str, Any]:
    """config.json of a run, of which the page needs the length.

    Raises:
        RunError: it is damaged.
    """
    mend = "put it back: each checkpoint of the run holds a copy"
    found = read_object(path, mend)
    with damage_of(path, mend):
        _total_steps(found.get("training") or {})
        _max_tokens(found.get("training") or {})
    return found


def _failure(run: Path, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What stopped the run; nothing where it was resumed since and got beyond that step."""
    failure = read_if_there(run / "failure.json")
    at = failure.get("step") if failure is not None else None
    beyond = isinstance(at, int) and steps and steps[-1]["step"] >= at
    return None if beyond else failure


def _total_steps(training: Mapping[str, Any]) -> int:
    """As `TrainingConfig.total_steps`, without the second that its imports take."""
    steps, tokens, per_step = (training.get(key) for key in ("steps", "tokens", "tokens_per_step"))
    return int(steps or (tokens or 0) // (per_step or 1))


def _max_tokens(training: Mapping[str, Any]) -> int | None:
    most = training.get("max_tokens")
    return None if most is None else int(most)


def _load(
    validations: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[float]] | None, str]:
    """Shares of each expert by layer, and where they were counted."""
    for found, where in ((validations, "over the last validation"), (steps, "in the last step")):
        if found and (load := found[-1].get("load")):
            return {number: [one / (sum(layer) or 1) for one in layer] for number, layer in load.items()}, where
    return None, ""


def _samples(directory: Path, number: int) -> tuple[list[str], int | None]:
    """A few texts of the newest undamaged checkpoint; none where there is none yet, or where it cannot be opened."""
    from finemoe.checkpoint.run_state.state import checkpoint_folders, newest_checkpoint

    if not number or not checkpoint_folders(directory / "checkpoints"):
        return [], None
    from finemoe.checkpoint.language_model import open_language_model
    from finemoe.generation import Engine, SamplingConfig

    try:
        folder = newest_checkpoint(directory)
        opened = open_language_model(folder)
    except FinemoeError as error:
        logger.warning("the page has no samples: %s", error)
        return [], None
    tokenizer = opened.tokenizer
    engine = Engine(opened.model, end_of_text_id=tokenizer.end_of_text_id, vocab_size=tokenizer.vocab_size)
    texts = []
    for seed in range(number):
        sampling = SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=_SAMPLE_TOKENS, seed=seed)
        texts.append(tokenizer.decode(engine.generate([(opened.first_id,)], sampling)[0].text_ids))
    return texts, int(folder.name.rpartition("-")[2])
