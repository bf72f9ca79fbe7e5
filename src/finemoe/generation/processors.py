"""What stands before a token changes its logits: penalties, logit bias, least length, a grammar."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.generation.config import SamplingConfig


@dataclass(frozen=True)
class Context:
    """What a row of logits is drawn after."""

    prompt: Sequence[int] = ()
    completion: Sequence[int] = ()
    """Drafts that are taken for granted are part of it."""
    end_ids: Collection[int] = ()
    """Tokens that would end the completion: not drawn before it has its least length."""
    allowed: Tensor | None = None
    """[vocab] bool, on the CPU: what a grammar lets through. None: there is none."""


def masked(logits: Tensor, contexts: Sequence[Context]) -> Tensor:
    """`logits [rows, vocab]` with minus infinity where a grammar lets nothing through; the same tensor without one."""
    if all(context.allowed is None for context in contexts):
        return logits
    masks = [torch.ones(logits.shape[1], dtype=torch.bool) if c.allowed is None else c.allowed for c in contexts]
    return logits.masked_fill(~torch.stack(masks), -torch.inf)


def adjusted(logits: Tensor, config: SamplingConfig, contexts: Sequence[Context]) -> Tensor:
    """`logits [rows, vocab]`, float32 on the CPU, as they are to be drawn from; the same tensor where nothing changes.

    Sources: repetition as transformers' RepetitionPenaltyLogitsProcessor; frequency and presence as OpenAI,
    mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence with the counts c of the completion alone; least
    length as vLLM's `min_tokens`, the tokens that end at minus infinity.
    """
    short = [len(context.completion) < config.min_new_tokens and bool(context.end_ids) for context in contexts]
    penalised = config.repetition_penalty != 1.0 or config.presence_penalty or config.frequency_penalty
    if not (penalised and contexts) and not config.logit_bias and not any(short):
        return masked(logits, contexts)
    logits = logits.clone()
    if penalised:
        for row, context in zip(logits, contexts, strict=True):
            _penalise(row, config, context)
    for token_id, bias in config.logit_bias:
        if token_id < logits.shape[1]:  # beyond lie ids that the tokenizer does not have, and that are never drawn
            logits[:, token_id] += bias
    logits = masked(logits, contexts)
    for row, context in zip(logits, contexts, strict=False):
        if len(context.completion) < config.min_new_tokens:
            _forbid_ending(row, context)
    return logits


def _penalise(row: Tensor, config: SamplingConfig, context: Context) -> None:
    completion = torch.tensor(context.completion, dtype=torch.int64)
    if config.repetition_penalty != 1.0:
        seen = torch.cat([torch.tensor(context.prompt, dtype=torch.int64), completion]).unique()
        seen = seen[seen < len(row)]
        own = row[seen]
        row[seen] = torch.where(own < 0, own * config.repetition_penalty, own / config.repetition_penalty)
    drawn, counts = completion.unique(return_counts=True)
    row[drawn] -= counts * config.frequency_penalty + config.presence_penalty


def _forbid_ending(row: Tensor, context: Context) -> None:
    """Unless nothing else is left, as where a grammar has come to its end."""
    ending = torch.tensor([i for i in context.end_ids if i < len(row)], dtype=torch.int64)
    others = row.clone()
    others[ending] = -torch.inf
    if others.amax() > -torch.inf:
        row.copy_(others)
