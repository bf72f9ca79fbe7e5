"""Two checkpoints on the same tokens: which choices of experts changed, why, and what it did to load and loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finemoe.analysis.neighbours import matched
from finemoe.analysis.passages import Passages, batches, require_experts, run_batch
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.core.logs import progress
from finemoe.core.statistics import CONFIDENCE, PairedRates
from finemoe.data import TokenBatch
from finemoe.model.moe.decision import RoutingDecision
from finemoe.model.moe.layer import MoELayer
from finemoe.model.transformer import ModelOutput

Floats = NDArray[np.float64]
FLIPS = ("flip_rate", "any_change", "top1_flip_rate", "gate_shift", "flip_rate_router", "flip_rate_states")
"""Sums over tokens of each, in this order; the last two: only the router is B's, only what it reads is B's."""
_GATES = ("gate_a", "gate_b")
_ALL = "all"
"""Stands in results for the domains together."""


@dataclass(frozen=True)
class Pairing:
    """Layers of two models that can be held against each other."""

    experts: Mapping[int, NDArray[np.int64]]
    """By layer: for each expert of the second the number of its counterpart in the first."""
    notes: tuple[str, ...]
    """What is to be known about the match."""


def pair(first: LanguageModel, second: LanguageModel) -> Pairing:
    """Which experts of the two correspond: those of the same number or, where some were pruned, of the same weights.

    Raises:
        ConfigError: a dense model, other tokens, other layers, or experts that do not correspond; says what differs.
    """
    for opened in (first, second):
        require_experts(opened)
    names = f"{first.source} and {second.source}"
    _check_tokens(first, second, names)
    widths = [opened.model.config.hidden_size for opened in (first, second)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"{names}: their hidden sizes are {widths[0]} and {widths[1]}, so that neither router can read the other's "
            "states; compare two checkpoints of one model"
        )
    ours, theirs = (_routing_layers(opened) for opened in (first, second))
    if list(ours) != list(theirs):
        raise ConfigError(
            f"{names}: experts are in layers {_listed(ours)} of the one and {_listed(theirs)} of the other"
        )
    experts, notes = {}, []
    for layer in ours:
        a, b = ours[layer].config, theirs[layer].config
        if a.num_routed_experts == b.num_routed_experts:
            experts[layer] = np.arange(a.num_routed_experts)
        else:
            experts[layer] = _pruned(ours[layer], theirs[layer], f"{names}: layer {layer}")
            kept = f"{b.num_routed_experts} of {a.num_routed_experts}"
            notes.append(f"Layer {layer}: {kept} experts are left, matched by their weights.")
        if a.experts_per_token != b.experts_per_token:
            notes.append(
                f"Layer {layer}: {a.experts_per_token} experts a token before, {b.experts_per_token} after; a choice "
                "counts as changed when the second model no longer makes it."
            )
    return Pairing(experts, tuple(notes))


def _check_tokens(first: LanguageModel, second: LanguageModel, names: str) -> None:
    a, b = first.tokenizer, second.tokenizer
    if a.fingerprint() == b.fingerprint():
        return
    if a.token_bytes != b.token_bytes or a.end_of_text_id != b.end_of_text_id:
        raise ConfigError(
            f"{names}: their tokenizers differ ({a.vocab_size} and {b.vocab_size} ids), so they cannot read the same "
            "tokens; compare two checkpoints of one model"
        )


def _pruned(ours: MoELayer, theirs: MoELayer, where: str) -> NDArray[np.int64]:
    a, b = ours.config, theirs.config
    what = f"{where}: {a.num_routed_experts} and {b.num_routed_experts} routed experts"
    shapes = [tuple(layer.experts.gate_up_proj.shape[1:]) for layer in (ours, theirs)]
    if b.num_routed_experts > a.num_routed_experts:
        raise ConfigError(f"{what}; give the model with more experts first")
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{what}, of other widths: {shapes[0]} and {shapes[1]}; they do not correspond")
    counterparts, lowest = matched(ours, theirs)
    if not counterparts:
        raise ConfigError(
            f"{what}, and the second's are not the first's with some left out (the least alike has a cosine of "
            f"{lowest:.2f} with any); experts can be matched by number or by weights"
        )
    return np.array(counterparts, dtype=np.int64)


def _routing_layers(opened: LanguageModel) -> dict[int, MoELayer]:
    layers = opened.model.moe_layers
    return {number: layer for number, layer in layers.items() if number < len(opened.model.blocks)}


def _listed(layers: Mapping[int, Any]) -> str:
    return ", ".join(map(str, layers)) or "none"


def routing_difference(
    first: LanguageModel, second: LanguageModel, passages: Sequence[Passages], *, rows: int = 8
) -> dict[str, Any]:
    """What changed from the first to the second, as plain values ready for JSON. Memory does not grow with the text.

    Args:
        first: before.
        second: after; it reads the very tokens that the first reads, documents joined or apart as there.
        passages: windows of `first`.
        rows: windows in one forward pass.

    Raises:
        ConfigError: as `pair`; or a domain is called `all`.
    """
    pairing = pair(first, second)
    second = replace(second, isolated=first.isolated)  # positions are the first's
    domains = [passage.domain for passage in passages]
    if _ALL in domains:
        raise ConfigError(f"a domain cannot be called `{_ALL}`, which stands for all the text: label it otherwise")
    tallies = {
        layer: _LayerTally(len(domains), first.model.moe_layers[layer].config.num_routed_experts)
        for layer in pairing.experts
    }
    losses = PairedRates(len(domains), (3,))
    tokens = np.zeros(len(domains), dtype=np.int64)
    with progress("reading with both", sum(len(p.windows) for p in passages), "windows") as advance:
        for name, batch in batches(first, passages, rows):
            domain = domains.index(name)
            window = _windows(batch)
            a, b = (_reading(opened, batch) for opened in (first, second))
            counts = window.sizes(np.ones(window.real.sum()))
            tokens[domain] += int(counts.sum())
            both = np.stack([b.losses, a.losses, b.losses - a.losses], axis=1)[window.real]
            losses.add(domain, window.sizes(both), counts)
            for layer, counterpart in pairing.experts.items():
                routers = (first.model.moe_layers[layer].router, second.model.moe_layers[layer].router)
                tallies[layer].add(domain, window, counts, _choices(layer, batch, a, b, routers, counterpart))
            advance(batch.num_sequences)
    return _results(domains, tokens, losses, tallies, pairing)


# ---- one batch ----


@dataclass(frozen=True)
class _Windows:
    """Which window each token of a batch that is text stands in."""

    real: NDArray[np.bool_]
    """[batch · seq]."""
    number: NDArray[np.int64]
    """[tokens], from 0."""
    count: int

    def sizes(self, values: Floats) -> Floats:
        """[windows, ...]: sums of `values [tokens, ...]` by window."""
        total = np.zeros((self.count, *values.shape[1:]))
        np.add.at(total, self.number, values)
        return total


def _windows(batch: TokenBatch) -> _Windows:
    weights = batch.weights.cpu().numpy() > 0
    rows = np.nonzero(weights.any(axis=1))[0]
    number = np.repeat(np.cumsum(weights.any(axis=1)) - 1, weights.shape[1])
    real = weights.reshape(-1)
    return _Windows(real, number[real], len(rows))


@dataclass(frozen=True)
class _Reading:
    output: ModelOutput
    losses: Floats
    """[batch · seq]."""
    inputs: Mapping[int, Tensor]
    """By layer: [batch · seq, hidden], what the router read."""


def _reading(opened: LanguageModel, batch: TokenBatch) -> _Reading:
    with _router_inputs(_routing_layers(opened)) as inputs:
        output, losses = run_batch(opened, batch.to(opened.device), record=True)
    return _Reading(output, losses.reshape(-1).double().cpu().numpy(), inputs)


@contextmanager
def _router_inputs(layers: Mapping[int, MoELayer]) -> Iterator[dict[int, Tensor]]:
    """Keep what each router is given during a forward pass."""
    kept: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
            kept[layer] = given[0]

        return keep

    with ExitStack() as hooks:
        for number, layer in layers.items():
            hooks.callback(layer.router.register_forward_pre_hook(keeper(number)).remove)
        yield kept


@dataclass(frozen=True)
class _Choices:
    """Dense gates `[tokens, experts]`, 0 where not chosen, and the expert chosen first `[tokens]`."""

    gates: Floats
    chosen: NDArray[np.bool_]
    first: NDArray[np.int64]


@torch.inference_mode()
def _choices(
    layer: int, batch: TokenBatch, a: _Reading, b: _Reading, routers: tuple[nn.Module, nn.Module], counterpart: Any
) -> tuple[_Choices, _Choices, _Choices, _Choices]:
    """What A chooses; what B does; what B's router chooses reading A's states; what A's chooses reading B's."""
    own, other = (reading.output.routing[layer].decision for reading in (a, b))
    assert own is not None
    assert other is not None
    tokens = batch.tokens.reshape(-1)
    width = own.scores.shape[1]
    same = np.arange(width)
    router_alone = routers[1](a.inputs[layer], tokens, None)
    states_alone = routers[0](b.inputs[layer], tokens, None)
    return (
        _dense(own, width, same),
        _dense(other, width, counterpart),
        _dense(router_alone, width, counterpart),
        _dense(states_alone, width, same),
    )


def _dense(decision: RoutingDecision, width: int, counterpart: NDArray[np.int64]) -> _Choices:
    """The decision over the first model's experts."""
    experts = counterpart[decision.expert_ids.cpu().numpy()]
    gates, chosen = np.zeros((len(experts), width)), np.zeros((len(experts), width), dtype=bool)
    np.put_along_axis(gates, experts, decision.gate_weights.double().cpu().numpy(), axis=1)
    np.put_along_axis(chosen, experts, True, axis=1)
    return _Choices(gates, chosen, experts[:, 0])


# ---- sums and results ----


@final
class _LayerTally:
    """Sums of one layer."""

    def __init__(self, num_domains: int, num_experts: int) -> None:
        self.flips = PairedRates(num_domains, (len(FLIPS) + len(_GATES),))
        self.loads = PairedRates(num_domains, (3, num_experts))
        """Choices of each expert by the second and by the first, and the difference."""

    def add(self, domain: int, window: _Windows, counts: Floats, choices: tuple[_Choices, ...]) -> None:
        """Count a batch."""
        a, b, router_alone, states_alone = choices
        k = a.chosen.sum(axis=1)
        changed = [(a.chosen & ~other.chosen).sum(axis=1) / k for other in (b, router_alone, states_alone)]
        shares = [made.gates / np.maximum(made.gates.sum(axis=1, keepdims=True), 1e-30) for made in (a, b)]
        values = np.stack([
            changed[0], (a.chosen != b.chosen).any(axis=1), a.first != b.first,
            np.abs(shares[0] - shares[1]).sum(axis=1) / 2, changed[1], changed[2],
            a.gates.sum(axis=1), b.gates.sum(axis=1),
        ], axis=1)  # fmt: skip
        self.flips.add(domain, window.sizes(values[window.real]), counts)
        chosen = np.stack([b.chosen, a.chosen, b.chosen.astype(np.int8) - a.chosen], axis=1).astype(np.float64)
        self.loads.add(domain, window.sizes(chosen[window.real]), counts)


def _results(
    domains: Sequence[str],
    tokens: NDArray[np.int64],
    losses: PairedRates,
    tallies: Mapping[int, _LayerTally],
    pairing: Pairing,
) -> dict[str, Any]:
    every: list[tuple[str, int | None]] = [(_ALL, None), *((name, number) for number, name in enumerate(domains))]
    experts = sum(len(tally.loads.rate()[0]) for tally in tallies.values())
    return {
        "confidence": CONFIDENCE,
        "notes": list(pairing.notes),
        "tokens": int(tokens.sum()),
        "domains": [
            {"domain": name, "tokens": int(tokens.sum() if number is None else tokens[number]),
             "loss_a": float(losses.rate(number)[1]), "loss_b": float(losses.rate(number)[0]),
             "difference": _interval(losses, number, 2)}
            for name, number in every
        ],
        "layers": [
            {"layer": layer, "domains": {name: _flips(tally.flips, number) for name, number in every}}
            for layer, tally in tallies.items()
        ],
        "experts": [
            record
            for layer, tally in tallies.items()
            for record in _experts(layer, tally.loads, domains, set(pairing.experts[layer].tolist()), experts)
        ],
    }  # fmt: skip


def _interval(rates: PairedRates, domain: int | None, column: int) -> dict[str, float | None]:
    mean, half = rates.rate(domain)[column], rates.half_interval(domain)
    low, high = (None, None) if half is None else (float(mean - half[column]), float(mean + half[column]))
    return {"mean": float(mean), "low": low, "high": high}


def _flips(flips: PairedRates, domain: int | None) -> dict[str, Any]:
    """Rates in one domain; the flip rate itself with its interval."""
    values = flips.rate(domain)
    named = {name: float(value) for name, value in zip((*FLIPS, *_GATES), values, strict=True)}
    return {**named, "flip_rate": _interval(flips, domain, 0)}


def _experts(
    layer: int, loads: PairedRates, domains: Sequence[str], kept: set[int], tested: int
) -> Iterator[dict[str, Any]]:
    """Change of load of each expert; a verdict holds for all `tested` experts at once (Bonferroni)."""
    after, before, change = loads.rate()
    half, strict = loads.half_interval(), loads.half_interval(confidence=1 - (1 - CONFIDENCE) / tested)
    each = [loads.rate(number) for number in range(len(domains))]
    uniform = before.sum() / len(before)
    for expert in range(len(before)):
        moved = None if half is None else half[2, expert]
        decided = strict is not None and abs(change[expert]) > strict[2, expert]
        word = "undecided" if not decided else "gained" if change[expert] > 0 else "lost"
        yield {
            "layer": layer,
            "expert": expert,
            "rate_a": float(before[expert]),
            "rate_b": float(after[expert]),
            "load_a": float(before[expert] / uniform),
            "load_b": float(after[expert] / uniform),
            "change": float(change[expert]),
            "low": None if moved is None else float(change[expert] - moved),
            "high": None if moved is None else float(change[expert] + moved),
            "verdict": word if expert in kept else "removed",
            "domains": {name: float(rates[2, expert]) for name, rates in zip(domains, each, strict=True)},
        }
