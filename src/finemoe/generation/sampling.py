"""From logits to the next token: what may be drawn, then temperature, top-k, top-p and min-p, then the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from finemoe.core.errors import CheckpointError
from finemoe.generation.config import SamplingConfig
from finemoe.generation.processors import Context, adjusted, masked

_FIRST_LOOK = 128
"""Tokens among which the nucleus is looked for first."""


def pick(
    logits: Tensor,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    contexts: Sequence[Context] = (),
) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    A draw is the argmax of scores plus Gumbel noise: rounding, which differs between batch sizes, then almost
    never changes the choice, as it can when one walks along a cumulative sum.

    Args:
        logits: [rows, vocab].
        config: temperature 0 needs no randomness.
        generators: one CPU generator a row; each gives `vocab` numbers per call, whatever the other rows do.
        contexts: what stands before each row, for penalties, least length and grammars. None: nothing does.

    Returns:
        ids [rows] int64 and logprobs [rows] float32, on the CPU. Logprobs are the model's own, in nats: at
        temperature 1 (that of `config`, with `tempered_logprobs`), before penalties, bias, least length, top-k, top-p
        and min-p; with a grammar, those of the model's distribution over the tokens that the grammar allows.

    Raises:
        CheckpointError: logits are not finite.
    """
    logits = _checked(logits)
    scores = adjusted(logits, config, contexts)
    logits = masked(logits, contexts)
    if config.temperature == 0.0:
        ids = scores.argmax(dim=-1)
    else:
        candidates, scores = _candidates(scores.double().div_(config.temperature), config)
        noise = torch.stack([torch.rand(logits.shape[1], generator=g, dtype=torch.float64) for g in generators])
        if candidates is not None:
            noise = noise.gather(-1, candidates)
        # Gumbel noise, in place. A uniform draw of exactly 0 becomes minus infinity: never chosen.
        ids = noise.log_().neg_().log_().neg_().add_(scores).argmax(dim=-1)
        if candidates is not None:
            ids = candidates.gather(-1, ids[:, None]).squeeze(-1)
    if config.tempered_logprobs and config.temperature:
        logits = logits / config.temperature
    return ids, logits.log_softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1)


def distribution(logits: Tensor, config: SamplingConfig, contexts: Sequence[Context] = ()) -> Tensor:
    """What `pick` draws from: log-probabilities [rows, vocab] float64, minus infinity for what is never drawn.

    Args: as those of `pick`. At temperature 0 all of it is on one token.

    Raises:
        CheckpointError: logits are not finite.
    """
    scores = adjusted(_checked(logits), config, contexts).double()
    nothing = torch.full_like(scores, -torch.inf)
    if config.temperature == 0.0:
        return nothing.scatter_(-1, scores.argmax(dim=-1, keepdim=True), 0.0)
    candidates, kept = _candidates(scores.div_(config.temperature), config)
    whole = kept if candidates is None else nothing.scatter_(-1, candidates, kept)
    return whole.log_softmax(dim=-1)


def alternatives(logits: Tensor, count: int, contexts: Sequence[Context] = ()) -> list[tuple[tuple[int, float], ...]]:
    """The `count` most probable tokens of each row of `logits [rows, vocab]`, best first: ids and logprobs, in nats.

    The logprobs are of the kind that `pick` gives. A grammar that allows fewer tokens has fewer alternatives.
    """
    logprobs = masked(_checked(logits), contexts).log_softmax(dim=-1)
    best, ids = logprobs.topk(min(count, logits.shape[1]), dim=-1)
    rows = zip(ids.tolist(), best.tolist(), strict=True)
    return [tuple(pair for pair in zip(*row, strict=True) if pair[1] > -math.inf) for row in rows]


def _checked(logits: Tensor) -> Tensor:
    logits = logits.float().cpu()
    if not math.isfinite(logits.sum(dtype=torch.float64)):  # which sums of finite float32 are, and in one pass
        raise CheckpointError(
            "the model's logits are not finite: its weights are damaged (`finemoe doctor MODEL --deep` says which), or "
            "its training diverged"
        )
    return logits


def _candidates(scores: Tensor, config: SamplingConfig) -> tuple[Tensor | None, Tensor]:
    """What top-k, top-p and min-p leave of `scores [rows, vocab]`.

    Returns ids [rows, candidates], best first, and their scores, minus infinity for those left out; ids None: all.
    """
    ids, kept = _most_probable(scores, config)
    if not config.min_p:
        return ids, kept
    # The best is always kept, so that what min-p leaves out does not depend on what went before.
    return ids, kept.masked_fill(kept < kept.amax(dim=-1, keepdim=True) + math.log(config.min_p), -torch.inf)


def _most_probable(scores: Tensor, config: SamplingConfig) -> tuple[Tensor | None, Tensor]:
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
