"""Expert load on labelled text: what each layer's experts get, by domain, together, and over checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.analysis.passages import Observed, Passages, ReadAs, observe, read_passages, require_experts
from finemoe.analysis.usage import Counts, lift, load_figures, mean, pair_counts, strongest_pairs
from finemoe.checkpoint.kinds import kind_of
from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.checkpoint.run_state.state import checkpoint_folders, find_damage
from finemoe.core.files import storage_error
from finemoe.core.logs import logger
from finemoe.core.reading import decode_json
from finemoe.model.moe.balance import max_violation
from finemoe.model.moe.layer import MoEConfig
from finemoe.training.alerts import ENOUGH, STARVED, Knobs, advice, alert_for, imbalance, routed_layers
from finemoe.training.directory import read_metrics

SCHEMA = 1
MOST_MATRIX = 64
"""Experts up to which the whole co-activation matrix goes into the results; it is in the .npz file always."""
_UNEVEN_HASH = 0.5
"""MaxVio from which a hash router's table is worth a word."""


@dataclass
class Tally:
    """Counts over batches; text alone, never filling."""

    layers: dict[int, MoEConfig]
    pairs: bool = True
    """Also count which experts are chosen together."""
    tokens: dict[str, int] = field(default_factory=dict)
    """By domain."""
    nats: dict[str, float] = field(default_factory=dict)
    """Summed losses, by domain."""
    load: dict[int, dict[str, Counts]] = field(default_factory=dict)
    """[experts] assignments, by layer and domain."""
    together: dict[int, dict[str, Counts]] = field(default_factory=dict)
    """[experts, experts] tokens that chose both, by layer and domain; the load on the diagonal."""
    batch_max_vio: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Tokens and MaxVio of each batch, by layer."""

    def add(self, one: Observed) -> None:
        """Count a batch whose decisions were kept."""
        keep = one.batch.weights.flatten() > 0
        count = int(keep.sum())
        self.tokens[one.domain] = self.tokens.get(one.domain, 0) + count
        loss = float((one.losses * one.batch.weights).double().sum())
        self.nats[one.domain] = self.nats.get(one.domain, 0.0) + loss
        for number, record in one.output.routing.items():
            assert record.decision is not None  # asked for by `observe`
            ids = record.decision.expert_ids
            chosen = (ids if count == len(ids) else ids[keep]).cpu().numpy()
            experts = self.layers[number].num_routed_experts
            if self.pairs:
                together = pair_counts(chosen, experts)
                load = np.diagonal(together).copy()
                pairs = self.together.setdefault(number, {})
                pairs[one.domain] = pairs.get(one.domain, 0) + together
            else:
                load = np.bincount(chosen.reshape(-1), minlength=experts)
            domains = self.load.setdefault(number, {})
            domains[one.domain] = domains.get(one.domain, 0) + load
            self.batch_max_vio.setdefault(number, []).append((count, max_violation(load)))

    def total(self, number: int) -> Counts:
        """Load of a layer over all domains."""
        return np.sum(list(self.load[number].values()), axis=0)

    def total_together(self, number: int) -> Counts:
        """Pairs of a layer over all domains."""
        return np.sum(list(self.together[number].values()), axis=0)

    def mean_batch_max_vio(self, number: int) -> float:
        """MaxVio_batch: over the batches of full size, as a smaller one is more uneven by chance alone.

        Within a tenth, as the ends of documents that stand alone are not counted.
        """
        full = 0.9 * max(count for count, _ in self.batch_max_vio[number])
        return float(np.mean([value for count, value in self.batch_max_vio[number] if count >= full]))


def tally(
    opened: LanguageModel, passages: Sequence[Passages], *, rows: int = 8, description: str | None = "reading"
) -> Tally:
    """Run `opened` over `passages` and count.

    Raises:
        ConfigError: it is dense.
    """
    require_experts(opened)
    counted = Tally(routed_layers(opened.model.config))
    for one in observe(opened, passages, rows=rows, description=description):
        counted.add(one)
    return counted


@dataclass(frozen=True)
class Stage:
    """One model of a series."""

    name: str
    path: Path
    step: int | None
    """Of its run; None for what is no checkpoint."""


def stages(models: Sequence[Path], *, last: bool = False) -> list[Stage]:
    """The models to look at, in order: each path, a run directory standing for all its undamaged checkpoints.

    Args:
        models: as given.
        last: of a run take the newest checkpoint alone.
    """
    found: list[Stage] = []
    for path in models:
        # A run's checkpoints are looked at from the outside: a checkpoint folder itself has none.
        folders = checkpoint_folders(path / "checkpoints") if kind_of(path) == "run" else []
        sound = []
        for folder in folders[:1] if last else folders:
            if damage := find_damage(folder):
                logger.warning("%s is damaged (%s): left out", folder, damage)
            else:
                sound.append(folder)
        name = path.resolve().name
        prefix = f"{name} " if len(models) > 1 else ""
        found += [_stage(folder, prefix) for folder in reversed(sound)]
        if not sound:
            one = path.resolve() in checkpoint_folders(path.resolve().parent)
            found.append(_stage(path, prefix) if one else Stage(name, path, None))
    return found


def _stage(folder: Path, prefix: str) -> Stage:
    step = int(folder.resolve().name.partition("-")[2])
    return Stage(f"{prefix}step {step}", folder, step)


@dataclass(frozen=True)
class LoadStudy:
    """All that was found."""

    results: dict[str, Any]
    """Ready for JSON, all but command, date and machine."""
    last: Tally
    """Counts of the last model."""


def study_load(
    models: Sequence[Path],
    *,
    texts: Sequence[str] = (),
    corpora: Sequence[str | ReadAs] = (),
    tokens: int = 16_384,
    length: int | None = None,
    rows: int = 8,
    last: bool = False,
) -> LoadStudy:
    """Measure the load of every model of the series on the same text.

    Raises:
        ConfigError: a dense model.
        FinemoeError: nothing to open or to read.
    """
    series, passages, cut_with, final = [], None, "", None
    for stage in (found := stages(models, last=last)):
        opened = open_language_model(stage.path)
        require_experts(opened)
        if passages is None or opened.tokenizer.fingerprint() != cut_with:  # another vocabulary, other windows
            passages = read_passages(opened, texts=texts, corpora=corpora, tokens=tokens, length=length)
            cut_with = opened.tokenizer.fingerprint()
        description = stage.name if len(found) > 1 else "reading"
        final = tally(opened, passages, rows=rows, description=description)
        series.append({"name": stage.name, "path": str(stage.path), "step": stage.step, **figures(opened, final)})
    assert passages is not None  # `stages` of at least one path holds one model at least
    assert final is not None
    run = _run_of(found[-1].path)
    results = {
        "kind": "load",
        "schema": SCHEMA,
        "text": {
            "tokens": dict(final.tokens),
            "length": passages[0].length,
            "tokens_per_batch": rows * passages[0].length,
        },
        "starved_below": STARVED,
        "series": series,
        "lift": _lifts(final),
        **history(run, found[-1].step),
    }
    return LoadStudy(results, final)


def figures(opened: LanguageModel, counted: Tally) -> dict[str, Any]:
    """Everything about one model."""
    layers = {str(number): _layer(counted, number) for number in sorted(counted.load)}
    each = layers.values()
    tokens, nats = counted.tokens, counted.nats
    return {
        "loss": {domain: nats[domain] / tokens[domain] for domain in tokens if tokens[domain]},
        "layers": layers,
        **{
            name: mean([layer[name] for layer in each]) for name in ("max_vio", "max_vio_batch", "entropy", "variation")
        },
        "dead": sum(layer["dead"] for layer in each),
        "starved": sum(layer["starved"] for layer in each),
        "experts": sum(layer["experts"] for layer in each),
        "alerts": list(alerts(opened, counted)),
        "enough": all(counted.total(number).mean() >= ENOUGH for number in counted.load),
    }


def _layer(counted: Tally, number: int) -> dict[str, Any]:
    config = counted.layers[number]
    k = config.experts_per_token
    pairs = counted.together.get(number, {})
    return {
        "experts": config.num_routed_experts,
        "experts_per_token": k,
        "router": config.router.kind,
        **load_figures(counted.total(number)),
        "max_vio_batch": counted.mean_batch_max_vio(number),
        "domains": {domain: load_figures(load) for domain, load in counted.load[number].items()},
        "pairs": strongest_pairs(counted.total_together(number), sum(counted.tokens.values()), k) if pairs else [],
        "domain_pairs": {domain: strongest_pairs(each, counted.tokens[domain], k) for domain, each in pairs.items()},
    }


def _lifts(counted: Tally) -> dict[str, Any]:
    """Layer -> matrix, of layers small enough."""
    tokens = sum(counted.tokens.values())
    made = {}
    for number in sorted(counted.together):
        pairs = counted.total_together(number)
        if len(pairs) <= MOST_MATRIX and counted.layers[number].experts_per_token > 1:
            matrix = lift(pairs, tokens, counted.layers[number].experts_per_token)
            made[str(number)] = [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in matrix]
    return made


def alerts(opened: LanguageModel, counted: Tally) -> Iterator[dict[str, Any]]:
    """What a run would have said of these loads, in the same words; and a word on tables of hash routers."""
    knobs = _knobs(opened)
    for number in sorted(counted.load):
        layer, load = counted.layers[number], counted.total(number)
        found = imbalance(load, layer.experts_per_token)
        if not layer.router.learned:
            if max_violation(load) >= _UNEVEN_HASH and layer.router.table != "balanced":
                said = f"layer {number}: MaxVio {max_violation(load):.2f}. {advice(layer, None)[1]}"
                yield {"layer": number, "level": "note", "message": said}
        elif found is not None and found.level:
            alert = alert_for(0, number, layer, found, found.level, knobs)
            trained = "" if opened.own else "If it is trained further: "
            yield {"layer": number, "level": alert.level, "message": trained + alert.message}


def _knobs(opened: LanguageModel) -> Knobs | None:
    """Of the run that the model is from; None where that is not known, or written by another version."""
    run = _run_of(opened.source)
    if run is None:
        return None
    try:
        config = decode_json((run / "config.json").read_bytes())
        rate = (config.get("balancing") or {}).get("rate")
        begun = config.get("start_from") is not None
        return Knobs(float(config["optimizer"]["learning_rate"]), None if rate is None else float(rate), opened=begun)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _run_of(path: Path) -> Path | None:
    """The run directory that `path` is, or is a checkpoint of."""
    candidates = (path, *path.resolve().parents[:2])
    return next((folder for folder in candidates if (folder / "metrics.jsonl").is_file()), None)


def history(run: Path | None, until: int | None = None) -> dict[str, Any]:
    """What metrics.jsonl of a run knows of its steps up to `until`: the load at each validation, and the alerts."""
    known = read_metrics(run) if run is not None else []
    records = [one for one in known if until is None or one.get("step", 0) <= until]
    loads = [_point(record) for record in records if record["kind"] == "validation" and "load" in record]
    said = [record for record in records if record["kind"] == "alert"]
    keys = ("step", "layer", "level", "message")
    return {"history": loads, "alerts_in_training": [{key: record[key] for key in keys} for record in said]}


def _point(record: dict[str, Any]) -> dict[str, Any]:
    layers = {number: load_figures(load) for number, load in record["load"].items()}
    return {
        "step": record["step"],
        "tokens": record["tokens"],
        "validation_loss": record.get("validation_loss"),
        "max_vio": mean([layer["max_vio"] for layer in layers.values()]),
        "layers": layers,
    }


def save_pairs(path: Path, counted: Tally) -> None:
    """`layer_N [experts, experts]`: tokens that chose both, and `tokens`, as a NumPy archive.

    Raises:
        RunError: it cannot be written.
    """
    arrays: dict[str, Any] = {f"layer_{number}": counted.total_together(number) for number in counted.together}
    try:
        np.savez_compressed(path, tokens=np.int64(sum(counted.tokens.values())), **arrays)
    except OSError as error:
        raise storage_error(path, error) from error
