"""From logits to the next token: temperature, then top-k, then top-p."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from finemoe.core.config import Config
from finemoe.core.errors import CheckpointError


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
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights are damaged or its training diverged")
    if config.temperature == 0.0:
        ids = logits.argmax(dim=-1)
    else:
        scores = _cut(logits.double() / config.temperature, config)
        noise = torch.stack([_gumbel(logits.shape[1], generator) for generator in generators])
        ids = (scores + noise).argmax(dim=-1)
    return ids, logits.log_softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1)


def _gumbel(size: int, generator: torch.Generator) -> Tensor:
    """[size] float64. A uniform draw of exactly 0 becomes minus infinity: never chosen."""
    return -(-torch.rand(size, generator=generator, dtype=torch.float64).log()).log()


def _cut(scores: Tensor, config: SamplingConfig) -> Tensor:
    """`scores [rows, vocab]` with what top-k and top-p leave out at minus infinity."""
    if config.top_k is not None and config.top_k < scores.shape[1]:
        chosen = scores.topk(config.top_k, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, chosen, scores.gather(-1, chosen))
    if config.top_p is not None and config.top_p < 1.0:
        probabilities, order = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        # The first always stays: what comes before it is 0, below any top_p.
        left_out = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= config.top_p)
        scores = scores.masked_fill(left_out, -torch.inf)
    return scores
