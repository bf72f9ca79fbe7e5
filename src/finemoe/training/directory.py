"""What a run directory says of itself, for those who need no torch to ask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finemoe.checkpoint.kinds import COMPARISON, models_below, stages_below
from finemoe.core.errors import RunError
from finemoe.core.logs import logger, read_json_lines
from finemoe.core.reading import damage_of, is_number, read_object, require_numbers

SUMMARY, METRICS = "summary.json", "metrics.jsonl"
_COUNTED = ("steps", "tokens", "seconds", "tokens_per_second", "total_parameters", "active_parameters")
_MAY_MISS = ("max_vio", "dead_experts", "training_flops", "bits_per_byte", "peak_memory_bytes")
_PER_LAYER = ("load", "max_vio_per_layer", "dead_experts_per_layer", "selection_bias")
_NUMBERS = {
    "step": ("loss", "tokens", "seconds", "tokens_per_second"),
    "validation": ("tokens", "seconds"),
    "checkpoint": ("stall_seconds",),
}
"""By kind of record: what readers count with, besides its step."""
_IF_THERE = (
    "max_vio", "dead_experts", "processor_seconds", "validation_loss", "bits_per_byte", "gradient_norm",
    "learning_rate",
)  # fmt: skip
"""What may be missing, and is counted with where it is there."""
_ALWAYS_FINITE = ("tokens", "seconds", "tokens_per_second", "stall_seconds")
"""Whatever the loss has come to."""
_OF_A_STEP = ("step", "skipped", "alert", "warning")
"""A validation may be of step 0 too, before the first."""
_MOST_COUNT = 1 << 53
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")


def require_run(directory: Path) -> None:
    """Check that a run was begun in `directory`.

    Raises:
        RunError: not a run directory, or one checkpoint of a run.
    """
    if (directory / "manifest.json").exists() and (directory / "state.json").exists():
        raise RunError(f"{directory}: is one checkpoint of a run; give the run's own directory, two above it")
    if (directory / COMPARISON).exists():
        raise RunError(
            f"{directory}: is a comparison of several runs: `finemoe resume {directory}` on the command line goes on "
            "with all of them, and each lies in a folder of its own below arms/"
        )
    if not (directory / "config.json").exists():
        stages = stages_below(directory)
        if runs := models_below(directory) or [one for one in stages if (one / "config.json").exists()]:
            listed = ", ".join(map(str, runs[:5])) + (" ..." if len(runs) > 5 else "")
            which = "several runs; name one of them" if runs[1:] else "a run; name it"
            again = f"; all stages go on by the command that began them, `finemoe train RECIPE --out {directory}`"
            raise RunError(f"{directory}: holds {which}: {listed}{again if stages else ''}")
        for kept in sorted((directory / "checkpoints").glob("*/config.json"), reverse=True):
            raise RunError(f"{directory}: config.json is missing; {kept} is a copy of it, to be put back")
        raise RunError(f"{directory}: not a run directory (no config.json); `finemoe train RECIPE` starts one")


def read_summary(directory: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None while it is not.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    path = directory / SUMMARY
    if not path.exists():
        return None
    mend = f"`finemoe resume {directory}` writes it again"
    found = read_object(path, mend)
    with damage_of(path, mend):
        require_numbers(found, _COUNTED)
        for key, value in found.items():
            may_miss = key.startswith("final_") or key in _MAY_MISS
            if may_miss and value is not None and not is_number(value):
                raise ValueError(f"`{key}` must be a number")
            if key in _PER_LAYER:
                _check_layers(key, value)
    return found


def read_if_there(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of ours; None where there is no file.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    return read_object(path, "put it back, or remove it") if path.exists() else None


def summary_if_whole(directory: Path) -> dict[str, Any] | None:
    """As `read_summary`; None too where the file is damaged, which the log says: a resume writes it again."""
    try:
        return read_summary(directory)
    except RunError as error:
        logger.warning("%s", error)
        return None


def read_metrics(directory: Path, on_damage: Callable[[int], object] | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without damaged lines; `on_damage` is told their numbers, and the log names them.

    Raises:
        RunError: there is no such file, or it cannot be read.
    """
    path = directory / METRICS
    damaged: list[int] = []
    with damage_of(path, "put it back, or remove it: the run can go on without it"):
        records = read_json_lines(path, check_record, damaged.append)
    if on_damage is not None:
        for number in damaged:
            on_damage(number)
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        logger.warning("%s: line %d%s is damaged and left out", path, damaged[0], more)
    return records


def check_record(record: dict[str, Any]) -> None:
    """Make sure that a record of metrics.jsonl is one.

    Raises:
        ValueError: it is not.
    """
    kind, step = record.get("kind"), record.get("step")
    if not isinstance(kind, str) or type(step) is not int or step < 0:
        raise ValueError("a record has a kind and a step")
    require_numbers(record, _NUMBERS.get(kind, ()))
    require_numbers(record, tuple(key for key in _IF_THERE if record.get(key) is not None))
    if any(isinstance(value, int) and abs(value) >= _MOST_COUNT for value in record.values()):
        raise ValueError("a number in it is larger than anything that is counted")
    if any(key in record and not math.isfinite(record[key]) for key in _NUMBERS.get(kind, ()) if key in _ALWAYS_FINITE):
        raise ValueError("tokens and times are finite")
    if kind in _OF_A_STEP and step == 0:
        raise ValueError("steps count from 1")
    for key in _PER_LAYER:
        if key in record:
            _check_layers(key, record[key])
    _check_answers(record.get("samples", []))
    if kind == "alert":
        _check_alert(record)


def _check_alert(record: dict[str, Any]) -> None:
    layer, words = record.get("layer"), (record.get("level"), record.get("message"))
    if type(layer) is not int or layer < 0 or not all(isinstance(one, str) for one in words):
        raise ValueError("an alert has a layer, a level and a message")


def _check_answers(samples: Any) -> None:
    whole = isinstance(samples, list) and all(
        isinstance(one, dict) and isinstance(one.get("prompt"), str) and isinstance(one.get("answer"), str)
        and isinstance(one.get("ended"), bool) and isinstance(one.get("references", []), list) for one in samples
    )  # fmt: skip
    if not whole:
        raise ValueError("`samples` must hold prompts and answers")


def _check_layers(key: str, value: Any) -> None:
    """A figure for each layer, or counts of its experts.

    Raises:
        ValueError: they are none, or a layer has two spellings.
    """
    if not isinstance(value, dict) or not all(map(_LAYER.fullmatch, value)):
        raise ValueError(f"`{key}` must hold figures by layer")
    for figures in value.values():
        if key == "load":
            _check_counts(figures)
        elif not is_number(figures):
            raise ValueError(f"`{key}` must hold numbers")


def _check_counts(load: Any) -> None:
    """Assignments of a layer's experts.

    Raises:
        ValueError: they are none.
    """
    # A long run has many, and this takes no step of Python for each.
    if not isinstance(load, list) or set(map(type, load)) != {int} or not 0 <= min(load) <= max(load) < _MOST_COUNT:
        raise ValueError("`load` must hold counts of each expert")
