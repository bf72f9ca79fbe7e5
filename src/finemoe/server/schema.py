"""Requests: OpenAI's fields, ours under the one name `finemoe`, and nothing else: what is unknown is refused."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

MOST_LIKELY = 20
"""Alternatives beside a token, at most: OpenAI's bound."""
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 20)]
Layer = Annotated[str, Field(pattern=r"^[0-9]{1,4}$")]
Expert = Annotated[StrictInt, Field(ge=0, le=1 << 16)]


class Schema(BaseModel, ABC):
    """Closed to what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ExpertsSchema(Schema):
    """What holds for the experts of one request; its neighbours are not touched by it."""

    disabled: dict[Layer, list[Expert]] = Field(default={}, description="By layer: experts that are never chosen.")
    forced: dict[Layer, list[Expert]] = Field(default={}, description="By layer: experts that every token goes to.")
    active: Annotated[StrictInt, Field(ge=1, le=1 << 16)] | None = Field(
        default=None, description="Routed experts of a token, instead of the model's own number."
    )
    shared: StrictBool = Field(default=True, description="false: the shared experts add nothing.")
    routed: StrictBool = Field(default=True, description="false: the routed experts add nothing.")


class FinemoeFields(Schema):
    """What OpenAI's API has not."""

    routing: StrictBool = Field(default=False, description="Report the experts that each token came out of.")
    experts: ExpertsSchema | None = Field(default=None, description="What holds for the experts.")
    guess: Literal["text", "module"] | None = Field(
        default=None,
        description="Speculative decoding: where guesses of the next tokens come from. The text is the same.",
    )
    top_k: Count | None = Field(default=None, description="Draw among so many most probable tokens.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None, description="Draw among tokens at least so many times as probable as the best."
    )
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = Field(
        default=1.0, description="Divides scores of tokens that were there."
    )
    min_new_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 20)] = Field(
        default=0, description="Before so many, the text does not end."
    )
    stop_ids: Annotated[list[Annotated[StrictInt, Field(ge=0, le=1 << 30)]], Field(max_length=64)] = Field(
        default=[], description="Tokens that end the text, beside the model's own."
    )
    ignore_end: StrictBool = Field(default=False, description="Go on behind the end of the text and of the turn.")
    regex: StrictStr | None = Field(
        default=None, description="All of the text matches this expression (Rust's syntax)."
    )
    choice: list[Annotated[StrictStr, Field(min_length=1)]] | None = Field(
        default=None, description="The text is one of these.", min_length=1, max_length=1000
    )
    special: StrictBool = Field(
        default=False, description="Read control tokens that a prompt spells out as tokens, not as text."
    )


class StreamOptions(Schema):
    """Of a stream."""

    include_usage: StrictBool = Field(default=False, description="Tokens are counted in one more chunk at the end.")


class Sampling(Schema, ABC):
    """What both ways to complete have in common."""

    model: StrictStr = Field(description="As GET /v1/models names it.")
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 always takes the most probable token; 1 where it is left out."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = Field(
        default=None, description="Ends the text, which leaves it out; across the borders of tokens."
    )
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(
        default=None, description="Equal seeds give equal text; left out, each request draws its own."
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]] | None
    ) = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = Field(
        default=None, description="Whatever the client calls its user; nothing depends on it."
    )
    finemoe: FinemoeFields = Field(default=FinemoeFields(), description="What OpenAI's API has not.")

    @field_validator("stop")
    @classmethod
    def _stops_something(cls, value: Any) -> Any:
        if "" in ([value] if isinstance(value, str) else value or []):
            raise ValueError("an empty string would stop every text before it begins; leave it out")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions: continue a text."""

    prompt: StrictStr | list[StrictInt] | Annotated[list[StrictStr | list[StrictInt]], Field(min_length=1)] = Field(
        description="A text, ids of tokens, or a list of either."
    )
    max_tokens: Count | None = Field(default=None, description="16 where it is left out, as OpenAI has it.")
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELY)] | None = Field(
        default=None, description="Log-probabilities of the tokens, and of so many most probable ones beside each."
    )
    echo: StrictBool | None = Field(default=None, description="The prompt comes first, with its log-probabilities.")
    suffix: StrictStr | None = Field(default=None, description="What stands behind the gap that is to be filled.")

    @model_validator(mode="after")
    def _check(self) -> Any:
        if self.suffix is not None and self.echo:
            raise ValueError("echo and suffix exclude each other: the prompt would not stand before the text")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("suffix goes with one prompt, a text")
        return self


class FunctionSchema(Schema):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=_NAME)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = Field(default=None, description="Only false or null: calls are not held to the schema.")

    @field_validator("strict")
    @classmethod
    def _not_strict(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError(
                "strict calls are not supported: leave it out, or hold the whole answer by response_format"
            )
        return value


class ToolSchema(Schema):
    """A tool, of the one kind there is."""

    type: Literal["function"]
    function: FunctionSchema


class FormatSchema(Schema):
    """A JSON schema by name."""

    name: Annotated[StrictStr, Field(pattern=_NAME)]
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer must be.")
    strict: StrictBool | None = Field(default=None, description="The answer always keeps to the schema.")


class ResponseFormat(Schema):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: FormatSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Any:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema", and that with it')
        return self


class TextPart(Schema):
    """A piece of a message."""

    type: Literal["text"]
    text: StrictStr


class CallFunction(Schema):
    """What was called."""

    name: StrictStr
    arguments: StrictStr = Field(description="JSON.")


class Call(Schema):
    """A call that the model made in an earlier answer."""

    id: StrictStr
    type: Literal["function"]
    function: CallFunction


class Message(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: StrictStr | None = None

    @model_validator(mode="after")
    def _check(self) -> Any:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant calls tools")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id goes with the role tool, and that with it")
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions: answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = Field(default=None, description="OpenAI's newer name of max_tokens.")
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSchema], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(default=None, description="Which function cannot be forced.")
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[Annotated[str, Field(pattern=_NAME)], StrictBool | StrictStr | StrictInt | None] = Field(
        default={}, description="Variables of the chat template, such as enable_thinking."
    )

    @model_validator(mode="after")
    def _check(self) -> Any:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice goes with tools")
        return self


class EmbeddingRequest(Schema):
    """POST /v1/embeddings: a vector for each text."""

    model: StrictStr
    input: (
        StrictStr
        | Annotated[list[StrictInt], Field(min_length=1)]
        | Annotated[list[StrictStr | list[StrictInt]], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(default=None, description="Vectors are as wide as the model: not supported.")
    user: StrictStr | None = None
    pooling: Literal["mean", "last"] = Field(
        default="mean", description="Of the last hidden states: their mean, or the last of them."
    )


class TokenizeRequest(Schema):
    """POST /tokenize."""

    model: StrictStr
    text: StrictStr
    special: StrictBool = Field(default=False, description="Read control tokens that it spells out as tokens.")


class DetokenizeRequest(Schema):
    """POST /detokenize."""

    model: StrictStr
    ids: list[Annotated[StrictInt, Field(ge=0, le=1 << 30)]]
