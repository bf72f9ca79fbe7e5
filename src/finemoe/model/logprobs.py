"""Log-probabilities of given tokens, in chunks, so that [tokens, vocab] is never whole in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.model.transformer import Transformer

_CHUNK_ELEMENTS = 1 << 21
"""Logits a chunk holds: 8 MiB in float32."""


@torch.no_grad()
def token_logprobs(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How probable `targets` are after the states `hidden`.

    Args:
        model: for its head.
        hidden: [..., hidden] states of the last norm, as in `ModelOutput.hidden`.
        targets: [...] int64 ids.

    Returns:
        Log-probabilities in nats, float32, and whether the target was the most probable token; both in the shape of
        `targets`, which may be empty.
    """
    flat, wanted = hidden.flatten(0, -2), targets.flatten()
    logprobs = torch.empty(wanted.shape, dtype=torch.float32, device=hidden.device)
    greedy = torch.empty(wanted.shape, dtype=torch.bool, device=hidden.device)
    rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(wanted), rows):
        piece = slice(start, start + rows)
        logits = model.logits(flat[piece]).float()
        chosen = logits.gather(-1, wanted[piece, None])[:, 0]
        logprobs[piece] = chosen - logits.logsumexp(dim=-1)
        greedy[piece] = chosen >= logits.amax(dim=-1)
    return logprobs.view(targets.shape), greedy.view(targets.shape)


@torch.no_grad()
def logprobs_and_entropy(
    model: Transformer, hidden: Tensor, targets: Tensor, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """How probable `targets [tokens]` are after `hidden [tokens, hidden]`, and how undecided the model is there.

    Args:
        model: for its head.
        hidden: states of the last norm.
        targets: int64 ids.
        vocab_size: ids from here on are never drawn, and count for nothing. None: all are.

    Returns:
        Log-probabilities, and entropies of the whole distribution, in nats, float32; `[tokens]` each.
    """
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(logprobs)
    rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        all_ = model.logits(hidden[piece])[:, :vocab_size].float().log_softmax(dim=-1)
        logprobs[piece] = all_.gather(-1, targets[piece, None])[:, 0]
        entropy[piece] = -(all_.exp() * all_).sum(dim=-1)
    return logprobs, entropy
