"""From logits to the next token: what may be drawn, then temperature, top-k, top-p and min-p, then the draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor

from finemoe.core.config import Config
from finemoe.core.errors import CheckpointError
from finemoe.generation.processors import Context, adjusted, masked

_FIRST_LOOK = 128
"""Tokens among which the nucleus is looked for first."""


def _pairs(value: Any) -> Any:
    return tuple(sorted(value.items(), key=lambda pair: str(pair[0]))) if isinstance(value, Mapping) else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int)) else value


def _newer(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """`stop_at_end_of_text` as the `ignore_end` that it is the opposite of."""
    if "stop_at_end_of_text" not in data:
        return data
    if "ignore_end" in data:
        raise ValueError("stop_at_end_of_text is the opposite of ignore_end: give one of them")
    if not isinstance(data["stop_at_end_of_text"], bool):
        raise ValueError("stop_at_end_of_text must be true or false")
    others = {name: value for name, value in data.items() if name != "stop_at_end_of_text"}
    return {**others, "ignore_end": not data["stop_at_end_of_text"]}


def _no_empty(stops: tuple[str, ...]) -> tuple[str, ...]:
    if "" in stops:
        raise ValueError("an empty string would stop every text before it begins; leave it out")
    return stops


class SamplingConfig(Config):
    """How tokens are drawn, and when to stop.

    The order is that of transformers: repetition, presence and frequency penalties, logit bias, least length, the
    grammar, temperature, top-k, top-p, min-p. (vLLM has bias and least length before the penalties, and min-p before
    top-k; llama.cpp has temperature last.)
    """

    temperature: NonNegativeFloat = 1.0
    """Logits are divided by it; 0 always takes the most probable token."""
    top_k: PositiveInt | None = None
    """Draw among this many most probable tokens. None: all."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Draw among the fewest most probable tokens that together reach this probability. None: all."""
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    """Draw among tokens at least this many times as probable as the most probable one, at this temperature
    (transformers, vLLM; https://arxiv.org/abs/2407.01082). None or 0: all."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens in the prompt or the completion are divided by it where positive, multiplied where negative,
    once a token (https://arxiv.org/abs/1909.05858, transformers). 1: none; more than 1 discourages."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens in the completion, once (OpenAI). In nats; negative encourages."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken from the logits of tokens in the completion, as often as they are there (OpenAI). In nats."""
    logit_bias: Annotated[
        tuple[tuple[NonNegativeInt, Annotated[float, Field(ge=-100.0, le=100.0)]], ...], BeforeValidator(_pairs)
    ] = ()
    """Added to the logits of tokens, by id, as a mapping; -100 as good as bans one, 100 as good as forces it (OpenAI).
    In nats."""
    seed: int = 0
    max_new_tokens: PositiveInt = 128
    min_new_tokens: NonNegativeInt = 0
    """Tokens before which no token that stops is drawn, and no stop string counts (vLLM's `min_tokens`). A grammar
    that can only end comes first."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_several), AfterValidator(_no_empty)] = ()
    """Strings that end the completion; its text ends before them. One string is a list of one."""
    stop_ids: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_several)] = ()
    """Tokens that end the completion, as its last id, beside the model's own."""
    ignore_end: bool = False
    """Go on behind the end of the text and of the turn (vLLM's `ignore_eos`). `stop_ids` and `stop` still end it.
    `stop_at_end_of_text` is its opposite, and an older name for it."""
    logprobs: NonNegativeInt = 0
    """How many of the most probable tokens are reported beside each one drawn."""
    prompt_logprobs: NonNegativeInt | None = None
    """The same of each token of the prompt but the first. None: the prompt is not scored; 0: its own tokens alone."""

    @model_validator(mode="before")
    @classmethod
    def _read_older_name(cls, data: Any) -> Any:
        return _newer(data) if isinstance(data, Mapping) else data

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SamplingConfig:
        """pydantic's, which also knows the older name of `ignore_end`."""
        return super().model_copy(update=None if update is None else _newer(update), deep=deep)

    @model_validator(mode="after")
    def _check_lengths(self) -> SamplingConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        return self

    @property
    def stop_at_end_of_text(self) -> bool:
        """Whether the model's own end of a text or a turn ends the completion."""
        return not self.ignore_end

    def end_ids(self, model_stop_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end this completion, of a model that stops at `model_stop_ids`."""
        own = frozenset(self.stop_ids)
        return own if self.ignore_end else own | model_stop_ids


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
        temperature 1, before penalties, bias, least length, top-k, top-p and min-p; with a grammar, those of the
        model's distribution over the tokens that the grammar allows.

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
    if not all(edge.isfinite().all() for edge in logits.aminmax(dim=-1)):
        raise CheckpointError("the model's logits are not finite: its weights are damaged or its training diverged")
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
