"""The next token of many sequences at once, and what is reported beside it."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finemoe.generation.config import SamplingConfig
from finemoe.generation.processors import Context
from finemoe.generation.sampling import alternatives, pick
from finemoe.generation.sequence import Likely, Sequence
from finemoe.model.logprobs import token_logprobs
from finemoe.model.transformer import Transformer


@dataclass(frozen=True)
class Drawn:
    """A token, and what the model thought of it and of others."""

    token_id: int
    logprob: float
    likely: Likely


def draw(logits: Tensor, ready: Items[Sequence], stop_ids: frozenset[int]) -> list[Drawn]:
    """A token for each row of `logits [rows, vocab]`, rows with equal parameters together.

    Args:
        logits: what follows each of `ready`.
        ready: sequences, whose random streams go on.
        stop_ids: at which the model stops.
    """
    groups: dict[SamplingConfig, list[int]] = {}
    for row, sequence in enumerate(ready):
        groups.setdefault(sequence.sampling, []).append(row)
    drawn: dict[int, Drawn] = {}
    for sampling, rows in groups.items():
        chosen = logits if len(rows) == len(ready) else logits[rows]
        contexts = [_context(ready[row], stop_ids) for row in rows]
        ids, logprobs = pick(chosen, sampling, [ready[row].generator for row in rows], contexts)
        likely = alternatives(chosen, sampling.logprobs, contexts) if sampling.logprobs else [()] * len(rows)
        for row, *found in zip(rows, ids.tolist(), logprobs.tolist(), likely, strict=True):
            drawn[row] = Drawn(*found)
    return [drawn[row] for row in range(len(ready))]


def _context(sequence: Sequence, stop_ids: frozenset[int]) -> Context:
    context = sequence.context(stop_ids)
    return context if sequence.grammar is None else replace(context, allowed=sequence.grammar.allowed())


@torch.inference_mode()
def score_prompt(model: Transformer, sequence: Sequence, start: int, hidden: Tensor, vocab_size: int) -> None:
    """Add to `sequence.prompt_logprobs` what a piece of its prompt says of the tokens that follow.

    Args:
        model: for its head.
        sequence: its `prompt_logprobs` hold what was read before.
        start: position of the first token.
        hidden: [tokens, hidden] of the piece.
        vocab_size: ids from here on are not reported.
    """
    known = len(sequence.prompt_logprobs)
    targets = list(sequence.prompt[start + 1 : start + 1 + len(hidden)])
    if start + len(targets) <= known:
        return  # of a prompt that is read again
    states = hidden[: len(targets)]
    logprobs, _ = token_logprobs(model, states, torch.tensor(targets, device=hidden.device))
    count = sequence.sampling.prompt_logprobs or 0
    likely: list[Likely] = [()] * len(targets)
    if count:
        likely = alternatives(model.logits(states)[:, :vocab_size], count)
    found = list(zip(logprobs.tolist(), likely, strict=True))
    sequence.prompt_logprobs += found[known - start :]
