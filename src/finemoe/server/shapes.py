"""What is answered, for /openapi.json."""

from __future__ import annotations

from abc import ABC
from typing import Any, Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Facts(BaseModel):
    """Of the whole answer."""

    tokens_per_pass: float
    seconds: float
    weight_version: str = Field(description="As POST /update_weights_from_disk called them; `default` before that.")


class Head(BaseModel, ABC):
    """What answers have in common."""

    id: str
    created: int
    model: str
    usage: Usage
    finemoe: Facts


class TokenChoice(BaseModel, ABC):
    """One of the completions that were asked for."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    logprobs: dict[str, Any] | None = None
    finemoe: dict[str, Any] | None = Field(default=None, description="tokens: with the experts that each came out of.")


class ChatChoice(TokenChoice):
    """An answer."""

    message: dict[str, Any]


class ChatAnswer(Head):
    """Of POST /v1/chat/completions without a stream."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextChoice(TokenChoice):
    """A completion."""

    text: str
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    routed_experts: str | None = Field(
        default=None,
        description=(
            "base64 of an .npy file: int16 [tokens, layers, k], best first, of all tokens but the last, the prompt's "
            "included; layers are those with experts; -1 behind the experts of a layer that chooses fewer."
        ),
    )


class TextAnswer(Head):
    """Of POST /v1/completions without a stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    finemoe: dict[str, Any] = Field(description="Sizes, layers, and what it can do.")


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class ExpertsAnswer(BaseModel):
    """Cards by layer and expert."""

    experts: dict[str, dict[str, Any]]


class Renewed(BaseModel):
    """Of POST /update_weights_from_disk."""

    success: Literal[True]
    message: str
    weight_version: str


class Vector(BaseModel):
    """Of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    """Of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Vector]
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """Of POST /tokenize."""

    ids: list[int]
    tokens: list[str]
    count: int


class Words(BaseModel):
    """Of POST /detokenize."""

    text: str


class Health(BaseModel):
    """Of /health and /ready."""

    status: Literal["ok"]
