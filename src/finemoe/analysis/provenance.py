"""What results say of where they come from, and the folder that a report is written to."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finemoe.analysis.passages import Passages
from finemoe.charts import theme
from finemoe.charts.numbers import clean
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.environment import environment
from finemoe.core.files import storage_error, write_text
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure

SCHEMA = 1


def made_by() -> dict[str, Any]:
    """Version, command, date and machine of a result."""
    machine = environment()
    return {
        "finemoe_version": machine["packages"]["finemoe"],
        "command": shlex.join(["finemoe", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
    }


def provenance(kind: str, opened: LanguageModel, passages: Sequence[Passages]) -> dict[str, Any]:
    """The head of results: what they are, of which model and text, made when, where and by which command."""
    config = opened.model.config
    size = measure(config, 1)
    layers = {n: b.feed_forward for n, b in enumerate(config.blocks) if isinstance(b.feed_forward, MoEConfig)}
    return {
        "schema": SCHEMA,
        "kind": kind,
        **made_by(),
        "model": {
            "source": str(opened.source),
            "total_parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "num_layers": len(config.blocks),
            "moe_layers": {
                str(number): {
                    "routed": layer.num_routed_experts,
                    "active": layer.experts_per_token,
                    "shared": layer.num_shared_experts,
                    "router": layer.router.kind,
                }
                for number, layer in layers.items()
            },
        },
        "text": {
            "length": passages[0].length,
            "domains": {p.domain: {"windows": len(p.windows), "tokens": p.num_targets} for p in passages},
        },
    }


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    page: Callable[[Mapping[str, Any]], str],
    figures: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Write results.json, then what `page` and `figures` make of it: report.html, and figures/ as SVG and PNG.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.json", json.dumps(clean(results), indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "report.html", page(results))
        for old in (folder / "figures").glob("*.[sp][vn]g"):  # of an earlier report, which may have had more
            old.unlink()
        theme.save(figures(results), folder / "figures")
    except OSError as error:
        raise storage_error(folder, error) from error
