"""What lies in a folder of runs: which are finished, running, stopped or failed, and how far they came.

Read from the small files that runs leave behind, without torch and without opening a model. A file that is missing or
damaged leaves a figure out; it never hides a run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finemoe.checkpoint.kinds import COMPARISON, is_imported
from finemoe.core.errors import RunError
from finemoe.core.locks import is_held
from finemoe.core.reading import decode_json

State = Literal["finished", "running", "stopped", "failed"]
_TAIL_BYTES = 1 << 20
_DEPTH = 3  # of folders within folders
_HEAD = ("kind", "step", "tokens", "seconds")


@dataclass(frozen=True)
class RunInfo:
    """One run, comparison, study of the papers' claims, or import."""

    path: Path
    kind: Literal["run", "comparison", "paper", "imported"]
    model: str
    """In words."""
    state: State
    done: int | None
    """Steps of a run; finished runs of a comparison."""
    planned: int | None
    """The same, when it is finished; of a run that was ended by `training.max_tokens`, what it had done."""
    loss: float | None
    """What was measured last on what was held out; of a comparison, that of its best run."""
    measures: str | None
    """What that is: `loss` in nats, `reward`, or another figure of the method's; None where nothing was measured."""
    bytes: int
    """On the disk, checkpoints included."""
    changed: float
    """When it was written to last, in seconds since 1970."""
    message: str | None = None
    """Why it failed."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "path": str(self.path)}


def list_runs(folder: str | os.PathLike[str] = "runs") -> list[RunInfo]:
    """What lies in `folder` and the folders within, by path; of a comparison, or of a run, what it is itself made of.

    Raises:
        RunError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; `finemoe train RECIPE` makes its runs in runs/")
    if (folder / COMPARISON).is_file():
        return [look_at(run) for run in runs_of(folder)]
    own = describe(folder)
    return [own] if own is not None else list(_within(folder, _DEPTH))


def _within(folder: Path, depth: int) -> Iterator[RunInfo]:
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return
    for path in inside:
        found = None
        with contextlib.suppress(OSError):  # a folder that may not be looked into hides none of the others
            if not path.is_dir():
                continue
            found = describe(path)
        if found is not None:
            yield found
        elif depth > 1:
            yield from _within(path, depth - 1)


def describe(path: Path) -> RunInfo | None:
    """What `path` is; None where it is nothing that finemoe trains or imports."""
    if (path / COMPARISON).is_file():
        return _comparison(path)
    if is_imported(path):
        words = model_words(_object(path / "config.json").get("model"))
        return RunInfo(path, "imported", words, "finished", None, None, None, None, _size(path), _changed(path))
    config = _object(path / "config.json")
    made = (path / "checkpoints").is_dir() or (path / "summary.json").is_file()
    if made or isinstance(config.get("training"), Mapping):
        return look_at(path)
    return None


def runs_of(comparison: Path) -> list[Path]:
    """The runs of a comparison that were begun."""
    return sorted(path.parent for path in comparison.glob("arms/*/seed-*/config.json"))


def look_at(run: Path) -> RunInfo:
    """The run in a directory, whatever of it is there."""
    config, summary, failure = (_object(run / f"{name}.json") for name in ("config", "summary", "failure"))
    step, validation = newest_records(run / "metrics.jsonl")
    planned = _total_steps(config.get("training"))
    done = _whole(summary.get("steps")) or _whole(step.get("step")) or 0
    if summary and _has_read_all(config.get("training"), summary):
        planned = done
    state: State = "stopped"
    if is_held(run / ".lock"):
        state = "running"
    elif summary and (planned is None or done >= planned):
        state = "finished"
    elif (_whole(failure.get("step")) or 0) > done:
        state = "failed"
    measures, value = _measured(summary, "final_") if summary else _measured(validation)
    return RunInfo(
        path=run,
        kind="run",
        model=model_words(config.get("model")),
        state=state,
        done=done,
        planned=planned,
        loss=value,
        measures=measures,
        bytes=_size(run),
        changed=_changed(run / "metrics.jsonl", run / "config.json", run),
        message=str(failure.get("message", "")) if state == "failed" else None,
    )


def _comparison(path: Path) -> RunInfo:
    config, runs = _object(path / COMPARISON), [look_at(run) for run in runs_of(path)]
    arms, seeds = (len(value) if isinstance(value, list) else 0 for value in (config.get("arms"), config.get("seeds")))
    finished = [run for run in runs if run.state == "finished"]
    is_paper = is_study_of_papers(config)
    planned = None if is_paper else arms * seeds  # --only runs some of them
    state: State = "stopped"
    if is_held(path / ".lock"):
        state = "running"
    elif (path / "results.json").exists() and (planned is None or len(finished) >= planned):
        state = "finished"
    elif any(run.state == "failed" for run in runs):
        state = "failed"
    values = [run.loss for run in finished if run.loss is not None]
    measures = next((run.measures for run in finished if run.loss is not None), None)
    best = max if measures == "reward" else min
    failed = next((run for run in runs if run.state == "failed"), None)
    return RunInfo(
        path=path,
        kind="paper" if is_paper else "comparison",
        model=f"{arms} arm{'s' * (arms != 1)}, {seeds} seed{'s' * (seeds != 1)}",
        state=state,
        done=len(finished),
        planned=planned,
        loss=best(values, default=None),
        measures=measures,
        bytes=_size(path),
        changed=_changed(path / "results.json", *(run.path / "metrics.jsonl" for run in runs), path / COMPARISON),
        message=f"{failed.path}: {failed.message}" if failed is not None and state == "failed" else None,
    )


def is_study_of_papers(config: Mapping[str, Any]) -> bool:
    """Whether compare.json is of `finemoe paper`."""
    return str(config.get("name", "")).startswith("paper-")


def newest_records(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step and the last validation of metrics.jsonl, from its end; empty where there is none."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}, {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the first is cut, the last may be torn
            record = decode_json(line)
            if isinstance(record, dict):
                kind = "step" if record.get("kind") == "skipped" else str(record.get("kind"))
                found.setdefault(kind, record)
        if "step" in found and "validation" in found:
            break
    return found.get("step", {}), found.get("validation", {})


def model_words(model: Any) -> str:
    """A model's table of config.json in a few words: layers × width, experts of a token, of all, and shared ones."""
    blocks = model.get("blocks") if isinstance(model, Mapping) else None
    if not isinstance(blocks, list) or not blocks:
        return ""
    layers = [block.get("feed_forward") if isinstance(block, Mapping) else None for block in blocks]
    routed = [layer for layer in layers if isinstance(layer, Mapping) and layer.get("kind") == "moe"]
    words = f"{len(blocks)}×{model.get('hidden_size')}"
    if not routed:
        return f"{words}, dense"
    last = routed[-1]
    shared = f"+{last['num_shared_experts']}" if last.get("num_shared_experts") else ""
    return f"{words}, {last.get('experts_per_token')} of {last.get('num_routed_experts')}{shared}"


def _total_steps(training: Any) -> int | None:
    if not isinstance(training, Mapping):
        return None
    steps, tokens, per_step = (_whole(training.get(key)) for key in ("steps", "tokens", "tokens_per_step"))
    return steps or (tokens // per_step if tokens and per_step else None)


def _has_read_all(training: Any, summary: Mapping[str, Any]) -> bool:
    """Whether a bound of tokens has ended the run."""
    most = _whole(training.get("max_tokens")) if isinstance(training, Mapping) else None
    return most is not None and (_whole(summary.get("tokens")) or 0) >= most


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _measured(record: Mapping[str, Any], prefix: str = "") -> tuple[str | None, float | None]:
    """The headline of a measurement, whatever the method calls it, and its value: the loss, or its first figure, which
    may be unknown where others are known."""
    named = [f"{prefix}validation_loss", *(key for key in record if key.startswith(prefix) and key not in _HEAD)]
    values = ((key, record[key]) for key in named if key in record and key != "final_training_loss")
    key, first = next(((key, one) for key, one in values if one is None or type(one) in (int, float)), ("", None))
    name = key.removeprefix(prefix).removeprefix("validation_").replace("_", " ")
    return (None, None) if first is None else (name, float(first))


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = decode_json(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _size(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):  # a checkpoint that is being replaced
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _changed(*paths: Path) -> float:
    """When the newest of `paths` was written."""
    times = [0.0]
    for path in paths:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
