"""Requests: OpenAI's fields, ours under the one name `finemoe`, and nothing else: what is unknown is refused."""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt
from pydantic import StrictStr as AnyStr

from finemoe.server.errors import ApiError

MOST_LIKELY = 20
"""Alternatives beside a token, at most: OpenAI's bound."""
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
_TAKEN = frozenset(
    {"add_generation_prompt", "conversations", "messages", "self", "special", "template", "tokenizer", "tools"}
)
"""What a chat template is given already, or what would be taken for it."""


def _whole(value: Any) -> Any:
    """JSON knows no integers apart: 3.0 is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def unicode(text: str) -> str:
    """`text`, unless it has half a character, as JSON can spell out ("\\ud800") and nobody can read or write.

    Raises:
        ValueError: it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it is not valid Unicode: {error.reason} at place {error.start}") from error
    return text


StrictStr = Annotated[AnyStr, AfterValidator(unicode)]
Whole = BeforeValidator(_whole)
Integer = Annotated[StrictInt, Whole]
_CLOSED = Field(json_schema_extra={"additionalProperties": False})  # names that fit no pattern are refused
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 20), Whole]
Variable = Annotated[str, Field(pattern=_NAME)]
Stop = Annotated[AnyStr, Field(min_length=1), AfterValidator(unicode)]
Token = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]  # a number has one name, lest one entry hide another
Bias = Annotated[Number, Field(ge=-100, le=100)]
Layer = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")]
Expert = Annotated[StrictInt, Field(ge=0, le=1 << 16), Whole]
Table = Annotated[dict[Layer, list[Expert]], _CLOSED]


class Schema(BaseModel, ABC):
    """Closed to what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ExpertsSchema(Schema):
    """What holds for the experts of one request; its neighbours are not touched by it."""

    disabled: Annotated[dict[Layer, list[Expert]], _CLOSED] = Field(
        default={}, description="By layer: experts that are never chosen."
    )
    forced: Annotated[dict[Layer, list[Expert]], _CLOSED] = Field(
        default={}, description="By layer: experts that every token goes to."
    )
    active: Annotated[StrictInt, Field(ge=1, le=1 << 16), Whole] | None = Field(
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
    min_new_tokens: Annotated[StrictInt, Field(ge=0, le=1 << 20), Whole] = Field(
        default=0, description="Before so many, the text does not end."
    )
    stop_ids: Annotated[list[Annotated[StrictInt, Field(ge=0, le=1 << 30), Whole]], Field(max_length=64)] = Field(
        default=[], description="Tokens that end the text, beside the model's own."
    )
    ignore_end: StrictBool = Field(default=False, description="Go on behind the end of the text and of the turn.")
    regex: StrictStr | None = Field(
        default=None, description="All of the text matches this expression (Rust's syntax)."
    )
    choice: list[Stop] | None = Field(
        default=None, description="The text is one of these.", min_length=1, max_length=1000
    )
    special: StrictBool = Field(
        default=False, description="Read control tokens that a prompt spells out as tokens, not as text."
    )
    seed: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,18})$")] | None = Field(
        default=None, description="In the place of `seed`: digits of up to 63 bits, which not every JSON keeps."
    )
    first: Annotated[StrictInt, Field(ge=0, le=1 << 53), Whole] = Field(
        default=0, description="Number of the first choice: with one seed, equal numbers of one prompt give equal text."
    )
    tempered_logprobs: StrictBool = Field(
        default=False, description="Log-probabilities of the tokens are those at the temperature, not at 1."
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
    n: Annotated[StrictInt, Field(ge=1, le=128), Whole] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        default=None, description="Ends the text, which leaves it out; across the borders of tokens."
    )
    seed: Annotated[StrictInt, Field(ge=1 - (1 << 53), le=(1 << 53) - 1), Whole] | None = Field(
        default=None, description="Equal seeds give equal text; left out, each request draws its own."
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Token, Bias], _CLOSED] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = Field(
        default=None, description="Whatever the client calls its user; nothing depends on it."
    )
    finemoe: FinemoeFields = Field(default=FinemoeFields(), description="What OpenAI's API has not.")

    def check(self) -> None:
        """What several fields say together; asked once the model is known.

        Raises:
            ApiError: they do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream: true", param="stream_options")


class CompletionRequest(Sampling):
    """POST /v1/completions: continue a text."""

    prompt: StrictStr | list[Integer] | Annotated[list[StrictStr | list[Integer]], Field(min_length=1)] = Field(
        description="A text, ids of tokens, or a list of either."
    )
    max_tokens: Count | None = Field(default=None, description="16 where it is left out, as OpenAI has it.")
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELY), Whole] | None = Field(
        default=None, description="Log-probabilities of the tokens, and of so many most probable ones beside each."
    )
    echo: StrictBool | None = Field(default=None, description="The prompt comes first, with its log-probabilities.")
    suffix: StrictStr | None = Field(default=None, description="What stands behind the gap that is to be filled.")
    return_token_ids: StrictBool | None = Field(
        default=None, description="Choices have `prompt_token_ids` and `token_ids`, the one that ended it among them."
    )
    return_routed_experts: StrictBool | None = Field(
        default=None, description="Choices have `routed_experts`: of every token that was read, in all MoE layers."
    )

    def check(self) -> None:
        """As `Sampling.check`."""
        super().check()
        if self.suffix is not None and self.echo:
            said = "echo and suffix exclude each other: the prompt would not stand before the text"
            raise ApiError(400, said, param="echo")
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ApiError(400, "suffix goes with one prompt, a text", param="suffix")


class FunctionSchema(Schema):
    """A function that the model may call."""

    name: Annotated[AnyStr, Field(pattern=_NAME)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = Field(default=None, description="Calls cannot be held to their schema.")


class ToolSchema(Schema):
    """A tool, of the one kind there is."""

    type: Literal["function"]
    function: FunctionSchema


class FormatSchema(Schema):
    """A JSON schema by name."""

    name: Annotated[AnyStr, Field(pattern=_NAME)]
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer must be.")
    strict: StrictBool | None = Field(default=None, description="The answer always keeps to the schema.")


class TextFormat(Schema):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Schema):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: FormatSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
"""What the answer must be."""


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


Content = StrictStr | list[TextPart]


class Said(Schema):
    """What was said to the model."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: StrictStr | None = None


class Answered(Schema):
    """What the model answered."""

    role: Literal["assistant"]
    content: Content | None = None
    name: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: list[Call] | None = None
    refusal: None = None


class Returned(Schema):
    """What a tool that it called returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: StrictStr


Message = Annotated[Said | Answered | Returned, Field(discriminator="role")]
"""One turn of a conversation."""


class ChatRequest(Sampling):
    """POST /v1/chat/completions: answer a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = Field(default=None, description="OpenAI's newer name of max_tokens.")
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LIKELY), Whole] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSchema], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(default=None, description="Which function cannot be forced.")
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: Annotated[dict[Variable, StrictBool | StrictStr | Integer | None], _CLOSED] = Field(
        default={}, description="Variables of the chat template, such as enable_thinking."
    )

    def check(self) -> None:
        """As `Sampling.check`."""
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            said = "max_tokens is the older name of max_completion_tokens: give one of them"
            raise ApiError(400, said, param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")
        if self.tool_choice is not None and not self.tools:
            raise ApiError(400, "tool_choice goes with tools", param="tool_choice")
        taken = sorted(_TAKEN & self.chat_template_kwargs.keys())
        if taken:
            said = f"{taken[0]} cannot be set here, for the server sets it itself: leave it out"
            raise ApiError(400, said, param="chat_template_kwargs")


class EmbeddingRequest(Schema):
    """POST /v1/embeddings: a vector for each text."""

    model: StrictStr
    input: (
        StrictStr
        | Annotated[list[Integer], Field(min_length=1)]
        | Annotated[list[StrictStr | list[Integer]], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(default=None, description="Vectors are as wide as the model: not supported.")
    user: StrictStr | None = None
    pooling: Literal["mean", "last"] = Field(
        default="mean", description="Of the last hidden states: their mean, or the last of them."
    )


class WeightsRequest(Schema):
    """POST /update_weights_from_disk: other weights for a model that is served."""

    model_path: StrictStr = Field(description="On the server's machine, below the folder that it was started with.")
    model: StrictStr | None = Field(default=None, description="Which, where the server has several.")
    weight_version: Annotated[AnyStr, Field(max_length=100), AfterValidator(unicode)] | None = Field(
        default=None, description="What answers call these weights; left out, the last part of the path."
    )


class TokenizeRequest(Schema):
    """POST /tokenize."""

    model: StrictStr
    text: StrictStr
    special: StrictBool = Field(default=False, description="Read control tokens that it spells out as tokens.")


class DetokenizeRequest(Schema):
    """POST /detokenize."""

    model: StrictStr
    ids: list[Annotated[StrictInt, Field(ge=0, le=1 << 30), Whole]]
