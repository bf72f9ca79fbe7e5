"""How a completion is drawn, and when it stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

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

from finemoe.core.config import Config


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
    tempered_logprobs: bool = False
    """Log-probabilities of drawn tokens are those at `temperature`, with which a policy gradient compares; False: those
    at 1."""
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
