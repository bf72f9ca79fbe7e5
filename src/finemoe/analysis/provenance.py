"""What results say of where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from finemoe.analysis.passages import Passages
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.environment import command_line, environment
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.size import measure

SCHEMA = 1


def made_by() -> dict[str, Any]:
    """Version, command, date and machine of a result."""
    machine = environment()
    return {
        "finemoe_version": machine["packages"]["finemoe"],
        "command": command_line(),
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
