"""From logits to the next token: temperature, then top-k, then top-p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from finemoe.core.config import Config
from finemoe.core.errors import CheckpointError

_FIRST_LOOK = 128
"""Tokens among which the nucleus is looked for first."""


class SamplingConfig(Config):
    """How tokens are drawn, and when to stop."""

    temperature: NonNegativeFloat = 1.0
    """Logits are divided by it; 0 always takes the most probable token."""
    top_k: PositiveInt | None = None
    """Draw among this many most probable tokens. None: all."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Draw among the fewest most probable tokens that together reach this probability. None: all."""
    seed: int = 0
    max_new_tokens: PositiveInt = 128
    stop_at_end_of_text: bool = True
    """End the completion at the end-of-text token, or another that stops, which is then its last id."""


def pick(logits: Tensor, config: SamplingConfig, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    A draw is the argmax of scores plus Gumbel noise: rounding, which differs between batch sizes, then almost
    never changes the choice, as it can when one walks along a cumulative sum.

    Args:
        logits: [rows, vocab].
        config: temperature 0 needs no randomness.
        generators: one CPU generator a row; each gives `vocab` numbers per call, whatever the other rows do.

    Returns:
        ids [rows] int64 and logprobs [rows] float32, on the CPU. Logprobs are the model's own, in nats: at
        temperature 1, before top-k and top-p.

    Raises:
        CheckpointError: logits are not finite.
    """
    logits = logits.float().cpu()
    if not all(edge.isfinite().all() for edge in logits.aminmax(dim=-1)):
        raise CheckpointError("the model's logits are not finite: its weights are damaged or its training diverged")
    if config.temperature == 0.0:
        ids = logits.argmax(dim=-1)
    else:
        candidates, scores = _candidates(logits.double().div_(config.temperature), config)
        noise = torch.stack([torch.rand(logits.shape[1], generator=g, dtype=torch.float64) for g in generators])
        if candidates is not None:
            noise = noise.gather(-1, candidates)
        # Gumbel noise, in place. A uniform draw of exactly 0 becomes minus infinity: never chosen.
        ids = noise.log_().neg_().log_().neg_().add_(scores).argmax(dim=-1)
        if candidates is not None:
            ids = candidates.gather(-1, ids[:, None]).squeeze(-1)
    return ids, logits.log_softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1)


def _candidates(scores: Tensor, config: SamplingConfig) -> tuple[Tensor | None, Tensor]:
    """What top-k and top-p leave of `scores [rows, vocab]`.

    Returns ids [rows, candidates], best first, and their scores, minus infinity for those left out; ids None: all.
    """
    vocab = scores.shape[1]
    top_p = 1.0 if config.top_p is None else config.top_p
    if config.top_k is not None and config.top_k < vocab:
        best, ids = scores.topk(config.top_k, dim=-1)
        return ids, _nucleus(best, best.logsumexp(-1, keepdim=True), top_p)
    if top_p == 1.0:
        return None, scores
    whole, count = scores.logsumexp(-1, keepdim=True), _FIRST_LOOK
    while True:  # a nucleus is small as a rule: sorting the whole vocabulary would take longer than the model
        best, ids = scores.topk(min(count, vocab), dim=-1)
        kept = _nucleus(best, whole, top_p)
        if count >= vocab or not kept[:, -1].isfinite().any():
            return ids, kept
        count *= 32


def _nucleus(best: Tensor, whole: Tensor, top_p: float) -> Tensor:
    """Descending scores `best [rows, count]` with those behind the fewest that reach `top_p` at minus infinity."""
    if top_p == 1.0:
        return best
    probabilities = (best - whole).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    before[:, 0] = 0.0  # the first always stays
    return best.masked_fill(before >= top_p, -torch.inf)
