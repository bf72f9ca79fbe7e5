"""An analysis of experts that was written earlier, found again beside its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finemoe.model.config import ModelConfig

REPORT = "results.json"
"""What `finemoe analyze experts MODEL --out MODEL/experts` writes; any folder within the model's will do."""
_TOKENS = 8  # of a card


class Cards:
    """The newest analysis of a model's experts, looked for whenever it is asked for: one may be made meanwhile."""

    def __init__(self, source: Path, config: ModelConfig) -> None:
        self._source, self._config = source, config
        self._read: dict[tuple[Path, int], dict[str, Any] | None] = {}

    def newest(self) -> dict[str, Any] | None:
        """It, from within the model's folder, or from beside a file; None where none is about this model."""
        folder = self._source if self._source.is_dir() else self._source.parent
        found = []
        for path in (*folder.glob(f"*/{REPORT}"), *folder.glob(f"*/*/{REPORT}")):
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
        known = {(path, changed) for changed, path in found}
        self._read = {key: report for key, report in self._read.items() if key in known}
        for changed, path in sorted(found, reverse=True):
            if (path, changed) not in self._read:
                self._read[path, changed] = self._report(path)
            report = self._read[path, changed]
            if report is not None:
                return report
        return None

    def _report(self, path: Path) -> dict[str, Any] | None:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            layers = {layer["layer"]: layer["experts"] for layer in report["layers"]}
            source = Path(report["model"]["source"])
            if not isinstance(report["cards"], list):
                return None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        blocks = self._config.blocks
        own = {layer: blocks[layer].feed_forward.num_routed_experts for layer in self._config.moe_layers}
        beside = not self._source.is_dir() and source.name != self._source.name  # of another file in the same folder
        return None if beside or not own or layers != own else report


def short_cards(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The heart of each card, by layer and expert."""
    layers: dict[str, dict[str, Any]] = {}
    for card in report["cards"]:
        domains = sorted(card["domains"], key=lambda domain: -(domain.get("lift") or 0))
        tokens = [token["text"] for token in card["tokens"][:_TOKENS]]
        short = {"domain": domains[0]["domain"] if domains else None, "tokens": tokens, "share": card["share"]}
        layers.setdefault(str(card["layer"]), {})[str(card["expert"])] = {"title": " ".join(tokens[:3]), **short}
    return layers
