"""The folder that an evaluation leaves: results, report, figures, and what became of every item."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finemoe.charts.evaluation.page import evaluation_page, figures
from finemoe.charts.numbers import clean
from finemoe.charts.theme import save
from finemoe.core.files import storage_error, write_text
from finemoe.evaluation.results import Evaluated
from finemoe.evaluation.runner import Asked


def write(out: Path, results: Mapping[str, Any], models: Sequence[Evaluated]) -> None:
    """Write results.json, report.html, figures/ and items/MODEL/TASK.jsonl into `out`.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(
            out / "results.json", json.dumps(clean(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        for model in models:
            for name, asked in model.asked.items():
                path = out / "items" / _file_name(model.name) / f"{name}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, _items(asked))
        save(figures(results), out / "figures")
        write_text(out / "report.html", evaluation_page(results))
    except OSError as error:
        raise storage_error(out, error) from error


def _items(asked: Asked) -> str:
    lines = []
    for item, judged in zip(asked.items, asked.judged, strict=True):
        record: dict[str, Any] = {"id": item.id, "group": item.group, "outcome": judged.outcome}
        record |= {"scores": dict(judged.scores), "weight": judged.weight, "note": judged.note}
        lines.append(json.dumps(clean(record), ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def _file_name(name: str) -> str:
    """A model's name as one folder's."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"
