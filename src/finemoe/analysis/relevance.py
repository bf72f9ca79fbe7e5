"""How much a task needs each expert (ESFT, arXiv 2407.01906): gate and token scores, and the experts they select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finemoe.analysis.passages import Passages, observe, require_experts
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.selection import ExpertSelection, LayerSelection, Score, router_fingerprint, shape_of, trainable
from finemoe.core.errors import ConfigError

Scores = Mapping[int, NDArray[np.float64]]
"""By layer, [experts]."""
SAMPLE_LENGTH = 4096
"""Tokens of a sample in the paper, which takes 32 of them."""
DEFAULT_P: Mapping[Score, float] = {"gate": 0.1, "token": 0.2}
_SLACK = 1e-12


@dataclass(frozen=True)
class Relevance:
    """Both scores of every expert, as the paper has them: means over samples, each over its own length."""

    gate: Scores
    """g_i: mean gate weight; of a layer's experts they sum to what its gates sum to."""
    token: Scores
    """r_i: mean of 1 / K for every token that chose the expert; they sum to 1."""
    samples: int
    tokens: int

    def shares(self, score: Score) -> dict[int, NDArray[np.float64]]:
        """The scores of each layer over their sum.

        Over the experts of a layer, that is: the script released with the paper sums over the layers instead.
        """
        return {layer: values / values.sum() for layer, values in vars(self)[score].items()}


def sample_length(opened: LanguageModel) -> int:
    """Tokens of a sample: the model's own length, at most the paper's."""
    return min(opened.reach or SAMPLE_LENGTH, SAMPLE_LENGTH)


def expert_relevance(
    opened: LanguageModel, passages: Sequence[Passages], *, rows: int = 4, description: str | None = "reading"
) -> Relevance:
    """Both scores over all windows, each of which is a sample.

    Raises:
        ConfigError: a dense model, or batches of nothing.
    """
    require_experts(opened)
    blocks = len(opened.model.blocks)
    gate: dict[int, NDArray[np.float64]] = {}
    token: dict[int, NDArray[np.float64]] = {}
    samples = tokens = 0
    for seen in observe(opened, passages, rows=rows, description=description):
        real = (seen.batch.weights > 0).double()  # [samples, length]
        lengths = real.sum(dim=1)
        per_token = (real / lengths[:, None].clamp(min=1)).reshape(-1, 1)
        for layer, record in seen.output.routing.items():
            if layer >= blocks or record.decision is None:
                continue
            ids, gates = record.decision.expert_ids, record.decision.gate_weights.double()
            for into, values in ((gate, gates), (token, (gates > 0).double() / ids.shape[1])):
                sums = torch.zeros(record.decision.scores.shape[1], dtype=torch.float64, device=ids.device)
                sums.scatter_add_(0, ids.reshape(-1), (values * per_token).reshape(-1))
                into[layer] = into.get(layer, np.zeros(len(sums))) + sums.cpu().numpy()
        samples += int((lengths > 0).sum())
        tokens += int(lengths.sum())
    gate, token = ({layer: sums / samples for layer, sums in each.items()} for each in (gate, token))
    return Relevance(gate, token, samples, tokens)


def most_relevant(shares: NDArray[np.float64], p: float) -> list[int]:
    """The fewest experts, best first, whose shares reach `p` together; of equals the first."""
    order = np.argsort(-shares, kind="stable")
    reached = np.cumsum(shares[order]) >= p - _SLACK
    count = int(reached.argmax()) + 1 if reached.any() else len(order)
    return [int(expert) for expert in order[:count]]


def select_experts(
    opened: LanguageModel, relevance: Relevance, score: Score = "gate", p: float | None = None
) -> ExpertSelection:
    """The experts of every layer whose relevance reaches `p`; the paper's 0.1 (gate) or 0.2 (token) when None.

    Raises:
        ConfigError: an unknown score, or a `p` outside 0 to 1.
    """
    if score not in DEFAULT_P:
        raise ConfigError(f"score {score!r} is unknown; known: gate, token")
    p = DEFAULT_P[score] if p is None else p
    if not 0 < p <= 1:
        raise ConfigError(
            f"p {p} must be above 0 and at most 1: the share of relevance that the selected experts reach"
        )
    layers = []
    for layer, shares in sorted(relevance.shares(score).items()):
        experts = most_relevant(shares, p)
        layers.append(LayerSelection(layer=layer, experts=tuple(experts), scores=tuple(shares[experts].tolist())))
    config = opened.model.config
    count, share = trainable(config, {layer.layer: layer.experts for layer in layers})
    return ExpertSelection(
        source=str(opened.source),
        router_sha256=router_fingerprint(opened.model),
        model=shape_of(config),
        score=score,
        p=p,
        samples=relevance.samples,
        tokens=relevance.tokens,
        trainable_parameters=count,
        trainable_share=share,
        layers=tuple(layers),
    )


def relevance_results(relevance: Relevance, selection: ExpertSelection) -> dict[str, Any]:
    """Scores, selection and how relevance adds up over each layer's experts, as results hold them."""
    shares = relevance.shares(selection.score)
    return {
        "samples": relevance.samples,
        "tokens": relevance.tokens,
        "scores": {
            name: {str(layer): values.tolist() for layer, values in scores.items()}
            for name, scores in (("gate", relevance.gate), ("token", relevance.token))
        },
        "cumulative": {str(layer): np.cumsum(np.sort(values)[::-1]).tolist() for layer, values in shares.items()},
        "selection": selection.model_dump(mode="json"),
    }
