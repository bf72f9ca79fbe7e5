"""Many constrained passes over the same text, each no longer than it must be, and what they change with intervals.

The intact model reads a batch once and keeps what every block was given. A variation whose first constrained layer is L
goes on from there, and where it only leaves experts out, windows of which no token had chosen them are not run at all:
nothing changes in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finemoe.analysis.passages import Passages, batches, run_batch
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.logs import progress
from finemoe.core.statistics import PairedRates
from finemoe.data import TokenBatch
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.select import GroupsConfig

Estimate = dict[str, float | None]
"""mean, low, high: nats per token with the 95 % interval; the ends are None with too few windows."""


@dataclass(frozen=True)
class Variation:
    """One way of constraining the model."""

    label: str
    constraint: Mapping[int, RoutingConstraint]
    """By layer; empty: the intact model."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its record says besides the losses."""
    left_out: tuple[int, tuple[int, ...]] | None = None
    """The layer and the experts, where leaving these out is all that it does."""


@dataclass(frozen=True)
class Sweep:
    """Losses of every window under every variation, and what finding them took."""

    variations: Sequence[Variation]
    domains: NDArray[np.str_]
    """[windows]."""
    weights: NDArray[np.float64]
    """[windows]: targets that count."""
    intact: NDArray[np.float64]
    """[windows]: summed loss, nats."""
    losses: NDArray[np.float64]
    """[variations, windows]: summed loss, nats."""
    windows_run: NDArray[np.int64]
    """[variations]: windows that had to be run again."""
    load: Mapping[int, NDArray[np.int64]]
    """By layer, [experts]: assignments of the intact model, filling left out."""
    blocks_run: int
    """Blocks times windows that were computed, the intact pass included."""
    blocks_plain: int
    """What whole passes would have computed."""

    @property
    def work(self) -> dict[str, int]:
        """Forward work in blocks times windows, done and saved, as results report it."""
        return {"blocks_run": self.blocks_run, "blocks_plain": self.blocks_plain}


def sweep(
    opened: LanguageModel,
    passages: Sequence[Passages],
    variations: Sequence[Variation],
    *,
    rows: int = 4,
    description: str | None = None,
) -> Sweep:
    """Run every variation over every window.

    Args:
        opened: the model.
        passages: from `read_passages`.
        variations: at most a few thousand; a float64 for each and each window is kept.
        rows: windows in one forward pass. What every block is given is kept for that many.
        description: of the progress on stderr; none when None.
    """
    blocks = len(opened.model.blocks)
    total = (len(variations) + 1) * sum(len(passage.windows) for passage in passages)
    domains: list[str] = []
    weights, intact, again = [], [], []
    changed: list[NDArray[np.float64]] = []
    load: dict[int, NDArray[np.int64]] = {}
    work = 0
    with nullcontext(lambda _: None) if description is None else progress(description, total, "windows") as advance:
        for domain, batch in batches(opened, passages, rows):
            count = batch.num_sequences
            output, losses = run_batch(opened, batch, record=True, states=bool(variations))
            base, chosen = _window_sums(losses, batch), _chosen(output.routing, batch, blocks, load)
            advance(count)
            sums, ran = np.tile(base, (len(variations), 1)), np.zeros(len(variations), np.int64)
            for number, variation in enumerate(variations):
                rerun = _windows_to_run(opened, variation, chosen, count)
                if len(rerun):
                    first = min(variation.constraint)
                    part, state = _rows(batch, rerun), output.states[first][rerun]
                    _, lost = run_batch(opened, part, constraint=variation.constraint, start=(first, state))
                    sums[number, rerun.cpu().numpy()] = _window_sums(lost, part)
                    work += len(rerun) * (blocks - first)
                ran[number] = len(rerun)
                advance(count)
            work += count * blocks
            domains += [domain] * count
            weights.append(batch.weights.double().sum(dim=1).cpu().numpy())
            intact.append(base)
            changed.append(sums)
            again.append(ran)
    lost_sums = np.concatenate(changed, axis=1)
    return Sweep(variations, np.array(domains), np.concatenate(weights), np.concatenate(intact), lost_sums,
                 np.sum(again, axis=0), load, work, total * blocks)  # fmt: skip


def _window_sums(losses: Tensor, batch: TokenBatch) -> NDArray[np.float64]:
    return (losses.double() * batch.weights.double()).sum(dim=1).cpu().numpy()


def _rows(batch: TokenBatch, rows: Tensor) -> TokenBatch:
    return TokenBatch(*(vars(batch)[each.name][rows] for each in fields(batch)))


def _chosen(
    routing: Mapping[int, RoutingRecord], batch: TokenBatch, blocks: int, load: dict[int, NDArray[np.int64]]
) -> dict[int, Tensor]:
    """By layer, [windows, experts] bool: whether any token of the window chose the expert. Adds to `load`."""
    chosen = {}
    for layer, record in routing.items():
        decision = record.decision
        if layer >= blocks or decision is None:
            continue
        ids = decision.expert_ids.view(batch.num_sequences, -1)
        experts = decision.scores.shape[1]
        chosen[layer] = torch.zeros(len(ids), experts, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        real = decision.expert_ids[batch.weights.reshape(-1) > 0].reshape(-1)
        counted = torch.bincount(real, minlength=experts).cpu().numpy()
        load[layer] = load[layer] + counted if layer in load else counted
    return chosen


def _windows_to_run(opened: LanguageModel, variation: Variation, chosen: Mapping[int, Tensor], count: int) -> Tensor:
    """Indices of the windows of this batch whose loss may differ from the intact model's."""
    everything = torch.arange(count, device=opened.device)
    if not variation.constraint:
        return everything[:0]
    if variation.left_out is None:
        return everything
    layer, experts = variation.left_out
    config = opened.model.moe_layers[layer].config
    # Where groups are limited, an expert that was not chosen may still have been what its group was chosen for.
    if isinstance(config.router, GroupsConfig) and config.router.groups_per_token < config.router.num_groups:
        return everything
    return everything[chosen[layer][:, list(experts)].any(dim=1)]


def without_experts(opened: LanguageModel, layer: int, experts: Sequence[int]) -> RoutingConstraint:
    """The constraint that leaves `experts` of one layer out; the tokens take the next best, as far as there are any."""
    config: MoEConfig = opened.model.moe_layers[layer].config
    allowed = torch.ones(config.num_routed_experts, dtype=torch.bool, device=opened.device)
    allowed[list(experts)] = False
    left = config.num_routed_experts - len(experts)
    return RoutingConstraint(allowed=allowed, num_active=left if left < config.experts_per_token else None)


# ---- estimates ----


def estimate(sums: NDArray[np.float64], weights: NDArray[np.float64], domains: NDArray[np.str_]) -> Estimate:
    """Mean per token of windows that sum to `sums [windows]`, with the 95 % interval of `PairedRates` over windows."""
    real = weights > 0
    if not real.any():  # nothing but beginnings of documents that stand alone, which count nothing
        return {"mean": None, "low": None, "high": None}
    names = np.unique(domains[real])
    rates = PairedRates(len(names), ())
    for number, name in enumerate(names):
        inside = real & (domains == name)
        rates.add(number, sums[inside], weights[inside])
    mean, half = float(rates.rate()), rates.half_interval()
    if half is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def record(found: Sweep, number: int) -> dict[str, Any]:
    """One variation as results hold it: loss, and difference from the intact model paired by window."""
    variation, sums = found.variations[number], found.losses[number]
    everything = slice(None)
    by_domain = {}
    for name in dict.fromkeys(found.domains.tolist()):
        inside = found.domains == name
        by_domain[name] = _losses(found, sums, inside)
    return {
        "label": variation.label,
        **variation.about,
        "constraint": _described(variation.constraint),
        **_losses(found, sums, everything),
        "by_domain": by_domain,
        "windows_run": int(found.windows_run[number]),
    }


def intact(found: Sweep) -> dict[str, Any]:
    """The loss of the intact model, overall and by domain."""
    domains = dict.fromkeys(found.domains.tolist())
    return {
        "loss": estimate(found.intact, found.weights, found.domains),
        "by_domain": {
            name: {
                "loss": estimate(found.intact[inside], found.weights[inside], found.domains[inside]),
                "windows": int(inside.sum()),
                "tokens": int(found.weights[inside].sum()),
            }
            for name in domains
            for inside in [found.domains == name]
        },
    }


def _losses(found: Sweep, sums: NDArray[np.float64], part: Any) -> dict[str, Estimate]:
    weights, domains = found.weights[part], found.domains[part]
    return {
        "loss": estimate(sums[part], weights, domains),
        "difference": estimate((sums - found.intact)[part], weights, domains),
    }


def _described(constraint: Mapping[int, RoutingConstraint]) -> dict[str, Any]:
    """A constraint as JSON: its layers, and the fields that do something; one value where all layers agree."""
    layers = sorted(constraint)
    said: dict[str, Any] = {"layers": layers}
    for name in ("num_masked", "num_active", "routed", "shared", "allowed"):
        values = [vars(constraint[layer])[name] for layer in layers]
        if name == "allowed":
            values = [None if v is None else (~v).nonzero().flatten().tolist() for v in values]
        if any(value != RoutingConstraint.__dataclass_fields__[name].default for value in values):
            key = "left_out" if name == "allowed" else name
            said[key] = values[0] if all(value == values[0] for value in values) else values
    return said
