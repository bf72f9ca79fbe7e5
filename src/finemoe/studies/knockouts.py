"""What the claims of a paper need of every finished run: its own figures, and its losses under knock-outs.

Losses under knock-outs are kept in knockouts/ARM/seed-N.json of the study's directory, so that each is measured once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from finemoe.analysis.knockout import FRACTIONS, active_losses, masked_losses, without_shared
from finemoe.analysis.passages import read_passages
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.files import write_text
from finemoe.core.logs import progress
from finemoe.core.reading import damage_of, read_object, require_numbers
from finemoe.studies.arms import SizedArm
from finemoe.studies.claims import Experiment, Quantity
from finemoe.studies.config import CompareConfig
from finemoe.training.directory import read_summary

Figures = dict[Quantity, dict[int, float]]
"""By quantity and seed; a seed whose run has not finished is absent."""
_SUMMARY = {"loss": "final_validation_loss", "training": "final_training_loss", "max_vio": "max_vio"}
TOKENS = 65_536
"""Held-out tokens that a knock-out is measured on, at most of each domain."""


def gather(
    directory: Path,
    arms: Mapping[str, SizedArm],
    config: CompareConfig,
    experiments: Iterable[Experiment],
    *,
    quiet: bool,
    measure: Collection[str],
) -> Figures:
    """Every quantity of the claims of `experiments`, and the curves of Figures 4 and 5.

    `measure`: arms whose knock-outs are run where they are not there yet; those of others are left out.
    """
    wanted = dict.fromkeys(quantity for experiment in experiments for quantity in experiment.quantities())
    figures: Figures = {quantity: {} for quantity in wanted}
    knocked = sorted({quantity.arm for quantity in wanted if quantity.needs_knockout})
    finished = {
        (name, seed): summary
        for name in dict.fromkeys(quantity.arm for quantity in wanted)
        for seed in config.seeds
        if (summary := read_summary(directory / "arms" / arms[name].folder / f"seed-{seed}")) is not None
    }
    for quantity in wanted:
        if not quantity.needs_knockout:
            key = _SUMMARY[quantity.kind]
            for (name, seed), summary in finished.items():
                if name == quantity.arm and summary[key] is not None:
                    figures[quantity][seed] = summary[key]
    todo = [(name, seed) for name, seed in finished if name in knocked]
    for name, seed, record in _records(directory, arms, todo, quiet=quiet, measure=measure):
        for quantity, value in _quantities(name, record).items():
            figures.setdefault(quantity, {})[seed] = value
    return figures


def seeds_of(a: Mapping[int, float], b: Mapping[int, float]) -> list[int]:
    """Seeds that both have."""
    return sorted(a.keys() & b.keys())


def _records(
    directory: Path, arms: Mapping[str, SizedArm], todo: list[tuple[str, int]], *, quiet: bool, measure: Collection[str]
) -> Iterable[tuple[str, int, dict[str, Any]]]:
    paths = {(name, seed): directory / "knockouts" / arms[name].folder / f"seed-{seed}.json" for name, seed in todo}
    missing = [key for key in todo if key[0] in measure and not paths[key].exists()]
    if missing:
        with progress("knock-outs", len(missing), "runs") as advance:
            for name, seed in missing:
                opened = open_language_model(directory / "arms" / arms[name].folder / f"seed-{seed}")
                paths[name, seed].parent.mkdir(parents=True, exist_ok=True)
                write_text(paths[name, seed], json.dumps(_measured(opened), indent=1))
                if not quiet:
                    advance(1)
    for (name, seed), path in paths.items():
        if path.exists():
            yield name, seed, _read(path)


def _read(path: Path) -> dict[str, Any]:
    """What `_measured` found.

    Raises:
        RunError: the file is damaged.
    """
    mend = "remove it, and the same command measures it again"
    record = read_object(path, mend)
    with damage_of(path, mend):
        require_numbers(record, ("experts_per_token",))
        for name in ("masked", "active"):
            require_numbers(record[name], tuple(record[name]))
            [float(key) for key in record[name]]
        record["masked"]["0"] + (record["without_shared"] or 0.0) + 1 / record["experts_per_token"]
    return record


def _measured(opened: LanguageModel) -> dict[str, Any]:
    """Losses under the knock-outs of section 4.5, by what was changed; the intact model's under `masked` 0."""
    config = next(iter(opened.model.moe_layers.values())).config
    passages = read_passages(opened, tokens=TOKENS)
    half = max(1, (config.experts_per_token - 1) // 2)
    counts = list(range(half, config.experts_per_token + 1))
    masked, active = masked_losses(opened, passages, FRACTIONS), active_losses(opened, passages, counts)
    shared = without_shared(opened, passages) if config.num_shared_experts else None
    losses = {f"{share:g}": record["loss"]["mean"] for share, record in zip(FRACTIONS, masked, strict=True)}
    return {
        "experts_per_token": config.experts_per_token,
        "masked": {"0": masked[0]["intact"]["mean"], **losses},
        "active": {str(count): record["loss"]["mean"] for count, record in zip(counts, active, strict=True)},
        "without_shared": shared and shared["loss"]["mean"],
    }


def _quantities(name: str, record: Mapping[str, Any]) -> dict[Quantity, float]:
    found: dict[Quantity, float] = {}
    for share, loss in record["masked"].items():
        found[Quantity(name, "masked", float(share))] = loss
        found[Quantity(name, "masked_rise", float(share))] = loss - record["masked"]["0"]
    for count, loss in record["active"].items():
        found[Quantity(name, "active", int(count) / record["experts_per_token"])] = loss
    if record["without_shared"] is not None:
        found[Quantity(name, "without_shared")] = record["without_shared"]
    return found
