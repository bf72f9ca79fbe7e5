"""Expert cards: what each routed expert takes, how that came about in training, and which experts are near it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.analysis.neighbours import centroid_likeness, weight_likeness
from finemoe.analysis.passages import Observed, Passages, observe, require_experts
from finemoe.analysis.specialization import (
    LEAST_COUNT,
    LEAST_SHARE,
    DomainShares,
    LayerTally,
    domain_shares,
    mutual_information,
    overlap,
    token_lifts,
)
from finemoe.analysis.usage import lift
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.open import load_model
from finemoe.checkpoint.run_state.state import checkpoint_folders, find_damage
from finemoe.text.tokenizer import Tokenizer

TOKENS, CONTEXTS, NEAREST = 12, 4, 3  # shown on each card
_CANDIDATES = 8 * CONTEXTS  # the highest gates often stand in the same words
_BEFORE, _AFTER = 12, 8  # tokens shown round the marked one
_LEAST_TOGETHER = 5  # tokens that two experts must have shared for their lift to mean anything

_VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Reading:
    """What one pass over the text left behind."""

    domains: tuple[str, ...]
    tokens: Ints
    """[domains] tokens read."""
    base: Ints
    """[vocab] how often each token stands in the text."""
    tallies: Mapping[int, LayerTally]
    choices: Mapping[int, list[NDArray[np.int16]]]
    """By layer: [tokens, k] a batch, to hold other checkpoints against; empty where there are none."""


def expert_cards(
    opened: LanguageModel, passages: Sequence[Passages], *, rows: int = 8, stability: bool = True
) -> dict[str, Any]:
    """The cards of every routed expert of the main model, as plain values ready for JSON.

    Memory: with `stability`, 2 · k bytes for each token and layer; nothing else grows with the text.

    Args:
        opened: the model.
        passages: what it reads.
        rows: windows in one forward pass.
        stability: compare with the run's other checkpoints, where the model is a run's.

    Raises:
        ConfigError: the model is dense.
        CheckpointError: a checkpoint of the run that does not fit.
    """
    require_experts(opened)
    earlier = _earlier(opened.source) if stability and opened.own else []
    reading = _read(opened, passages, rows, bool(earlier))
    history = {step: _overlaps(opened, folder, passages, rows, reading) for step, folder in earlier}
    layers: list[dict[str, Any]] = []
    cards: list[dict[str, Any]] = []
    for layer, tally in reading.tallies.items():
        shares = domain_shares(tally.counts, reading.tokens)
        known, chance = mutual_information(tally.counts)
        config = opened.model.moe_layers[layer].config
        layers.append({
            "layer": layer, "experts": len(tally.gates), "experts_per_token": config.experts_per_token,
            "shared_experts": config.num_shared_experts,
            "specialization": shares.score, "mutual_information_bits": known, "chance_bits": chance,
            "stability": [{"step": step, "overlap": _mean(found[layer])} for step, found in history.items()],
        })  # fmt: skip
        steps = {step: found[layer] for step, found in history.items()}
        cards += _cards_of(opened, passages, reading, layer, shares, steps)
    return {
        "domains": [
            {"domain": name, "tokens": int(count)} for name, count in zip(reading.domains, reading.tokens, strict=True)
        ],
        "tokens": int(reading.tokens.sum()),
        "token_rule": "highest lift = P(token | expert, by gate weight) / P(token), of tokens that the expert took at "
        f"least {LEAST_COUNT} times and that are at least {100 * LEAST_SHARE:g} % of what it took",
        "layers": layers,
        "cards": cards,
    }  # fmt: skip


def visible(token: bytes, blank: str = "␣") -> str:
    """A token for people: blanks and line ends as signs, many blanks by number, and so bytes that are no character."""
    text = token.decode("utf-8", errors="backslashreplace")
    shown = (_VISIBLE.get(char) or (char if char.isprintable() else f"\\u{ord(char):04x}") for char in text)
    return re.sub("␣{4,}", lambda run: f"␣×{len(run[0])}", "".join(shown).replace(" ", blank))


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


# ---- reading ----


def _read(opened: LanguageModel, passages: Sequence[Passages], rows: int, keep: bool) -> _Reading:
    domains = tuple(passage.domain for passage in passages)
    vocab = opened.model.config.vocab_size
    tallies = {
        layer: LayerTally(moe.config.num_routed_experts, len(domains), vocab, _CANDIDATES)
        for layer, moe in opened.model.moe_layers.items()
        if layer < len(opened.model.blocks)
    }
    tokens, base = np.zeros(len(domains), dtype=np.int64), np.zeros(vocab, dtype=np.int64)
    choices: dict[int, list[NDArray[np.int16]]] = {layer: [] for layer in tallies}
    place = 0
    for observed in observe(opened, passages, rows=rows):
        domain = domains.index(observed.domain)
        real, places, place = _real(observed, place)
        ids = observed.batch.tokens.reshape(-1).cpu().numpy()[real]
        tokens[domain] += len(ids)
        base += np.bincount(ids, minlength=vocab)
        for layer, experts, gates in decisions(observed, real):
            tallies[layer].add(domain, ids, places[real], experts, gates)
            if keep:
                choices[layer].append(experts.astype(np.int16))
    return _Reading(domains, tokens, base, tallies, choices)


def _real(observed: Observed, start: int) -> tuple[NDArray[np.bool_], Ints, int]:
    """Which tokens of the batch are text, where in the whole text each stands, and where the next batch begins."""
    real = observed.batch.weights.reshape(-1).cpu().numpy() > 0
    return real, np.arange(start, start + len(real)), start + len(real)


def decisions(observed: Observed, real: NDArray[np.bool_]) -> Iterator[tuple[int, Ints, NDArray[np.float64]]]:
    """Layer, expert ids `[tokens, k]` and gate weights `[tokens, k]` of the `real [batch · seq]` tokens."""
    for layer, record in observed.output.routing.items():
        assert record.decision is not None  # recorded, because it was asked for
        experts = record.decision.expert_ids.cpu().numpy()
        gates = record.decision.gate_weights.double().cpu().numpy()
        yield layer, experts[real], gates[real]


# ---- stability ----


def _earlier(source: Path) -> list[tuple[int, Path]]:
    """Step and folder of the undamaged checkpoints of the run before the one that is looked at, oldest first."""
    checkpoint = source.resolve()
    folders = checkpoint_folders(checkpoint.parent)
    if checkpoint in folders:  # one checkpoint of a run was given
        folders = folders[folders.index(checkpoint) + 1 :]
    else:
        sound = [folder for folder in checkpoint_folders(source / "checkpoints") if find_damage(folder) is None]
        return [(_step(folder), folder) for folder in reversed(sound[1:])]
    return [(_step(folder), folder) for folder in reversed(folders) if find_damage(folder) is None]


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _overlaps(
    opened: LanguageModel, folder: Path, passages: Sequence[Passages], rows: int, reading: _Reading
) -> dict[int, NDArray[np.float64]]:
    """By layer, for each expert: Jaccard overlap of what it takes at the checkpoint `folder` with what it takes now."""
    older = replace(opened, model=load_model(folder).to(opened.device))
    found: dict[int, list[NDArray[np.int16]]] = {layer: [] for layer in reading.tallies}
    for observed in observe(older, passages, rows=rows, description=f"reading with {folder.name}"):
        real, _, _ = _real(observed, 0)
        for layer, experts, _ in decisions(observed, real):
            found[layer].append(experts.astype(np.int16))
    return {
        layer: overlap(np.concatenate(found[layer]), np.concatenate(reading.choices[layer]), len(tally.gates))
        for layer, tally in reading.tallies.items()
    }


# ---- one card ----


def _cards_of(
    opened: LanguageModel,
    passages: Sequence[Passages],
    reading: _Reading,
    layer: int,
    shares: DomainShares,
    steps: Mapping[int, NDArray[np.float64]],
) -> Iterator[dict[str, Any]]:
    """The cards of one layer, in the order of its experts."""
    tally, moe = reading.tallies[layer], opened.model.moe_layers[layer]
    load = tally.counts.sum(axis=0)
    together = lift(tally.joint, int(reading.tokens.sum()), moe.config.experts_per_token)
    together[tally.joint < _LEAST_TOGETHER] = np.nan
    near = {"router": centroid_likeness(moe), "weights": weight_likeness(moe), "coactivation": together}
    spelling = opened.tokenizer.token_bytes
    for expert, taken in enumerate(load.tolist()):
        lifts = token_lifts(tally, expert, reading.base, TOKENS)
        yield {
            "layer": layer,
            "expert": expert,
            "assignments": taken,
            "share": taken / load.sum(),
            "relative_load": taken * len(load) / load.sum(),
            "mean_gate": tally.gates[expert] / taken if taken else None,
            "specialization": float(shares.specialization[expert]),
            "divergence_bits": float(shares.divergence[expert]),
            "domains": [
                {"domain": name, "share": float(shares.share[d, expert]), "rate": float(shares.rate[d, expert]),
                 "lift": float(shares.lift[d, expert])}
                for d, name in enumerate(reading.domains)
            ],
            "tokens": [
                {"id": found.token, "text": visible(spelling.get(found.token, b"")), "count": found.count,
                 "share": found.share, "lift": found.lift}
                for found in lifts
            ],
            "contexts": _contexts(opened.tokenizer, passages, tally, expert),
            "stability": [{"step": step, "overlap": float(found[expert])} for step, found in steps.items()],
            "nearest": {name: _nearest(table, expert) for name, table in near.items()},
        }  # fmt: skip


def _nearest(table: NDArray[np.float64] | None, expert: int) -> list[dict[str, Any]]:
    """The experts with the highest values in the row of `expert`."""
    if table is None:
        return []
    row = table[expert]
    order = np.argsort(-np.nan_to_num(row, nan=-np.inf), kind="stable")[:NEAREST]
    return [{"expert": int(i), "value": float(row[i])} for i in order if not np.isnan(row[i])]


def _contexts(
    tokenizer: Tokenizer, passages: Sequence[Passages], tally: LayerTally, expert: int
) -> list[dict[str, Any]]:
    """Text round the expert's highest gates, the highest first; a token before the same next one only to fill up."""
    first: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    seen = set()
    for gate, place in zip(tally.highest.gates[expert], tally.highest.places[expert].tolist(), strict=True):
        if place < 0:
            break
        passage, window, position = _locate(passages, place)
        ids = passage.windows[window][:-1].tolist()
        shown = {
            "before": _text(tokenizer, ids[max(0, position - _BEFORE) : position]),
            "token": _text(tokenizer, ids[position : position + 1], "␣"),
            "after": _text(tokenizer, ids[position + 1 : position + 1 + _AFTER]),
            "gate": float(gate),
            "domain": passage.domain,
        }
        pair = (ids[position], passage.windows[window][position + 1])
        (again if pair in seen else first).append(shown)
        seen.add(pair)
    return sorted([*first, *again][:CONTEXTS], key=lambda context: -context["gate"])


def _text(tokenizer: Tokenizer, ids: Sequence[int], blank: str = " ") -> str:
    return visible(b"".join(tokenizer.token_bytes.get(token, b"") for token in ids), blank)


def _locate(passages: Sequence[Passages], place: int) -> tuple[Passages, int, int]:
    """Passage, window and position of a place of the whole text, counted as `_read` counts: filling included."""
    for passage in passages:
        size = len(passage.windows) * passage.length
        if place < size:
            return passage, place // passage.length, place % passage.length
        place -= size
    raise ValueError("a place beyond the text")
