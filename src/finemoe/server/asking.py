"""From what a client asks to what the engine is asked: prompts, sampling, grammars, what holds for the experts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.checkpoint.open import text_home
from finemoe.core.errors import CheckpointError, ConfigError, DataError
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Request
from finemoe.generation.grammar import Grammar
from finemoe.generation.scoring import middle_ids, reach_of
from finemoe.generation.sequence import Constraint
from finemoe.server.constraints import Wish, constrain
from finemoe.server.dialects import THINK, Dialect
from finemoe.server.errors import ApiError
from finemoe.server.models import Limits
from finemoe.server.schema import (
    Answered,
    ChatRequest,
    CompletionRequest,
    ExpertsSchema,
    ResponseFormat,
    Returned,
    Said,
    Sampling,
    SchemaFormat,
    WeightsRequest,
    unicode,
)

MIXED = "ids of tokens and texts are mixed: give one list of ids, or a list of lists"
DEFAULT_TOKENS = 16
"""Of POST /v1/completions where `max_tokens` is left out, as OpenAI has it."""


@dataclass(frozen=True)
class Asked:
    """What one request is for the engine."""

    prompts: Sequence[tuple[str, tuple[int, ...]]]
    """Texts and ids; n choices of each."""
    requests: Sequence[Request]
    """A choice each, those of the first prompt first."""
    thinking: bool = False
    """The prompt ended within a thought."""


def chat(request: ChatRequest, opened: LanguageModel, dialect: Dialect, limits: Limits) -> Asked:
    """A conversation.

    Raises:
        ApiError: what the model cannot do.
    """
    if opened.template is None:
        raise ApiError(
            400,
            f"{request.model} has no chat template, so it was not made to answer: ask POST /v1/completions to go on "
            "with a text",
            param="messages",
        )
    tools = None if request.tool_choice == "none" else request.tools
    if tools and dialect.tools is None:
        raise ApiError(400, f"{request.model}: its chat template knows no tools that can be read", param="tools")
    given = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    messages = [_message(message) for message in request.messages]
    check_length(_spelled([messages, given]), opened, "messages")
    try:
        text, ids = opened.encode_chat(
            messages, special=request.finemoe.special, tools=given or None, **request.chat_template_kwargs
        )
    except DataError as error:  # which names the template's file: nothing that a client may know
        said = str(error).replace(opened.template.origin, "chat template")
        raise ApiError(400, said, param="messages") from error
    most = request.max_completion_tokens or request.max_tokens
    grammar = _grammar(request, request.response_format)
    logprobs = (request.top_logprobs or 0) if request.logprobs else 0
    room = _room(len(ids), most, opened, limits, "messages")
    sampling = _sampling(request, room, logprobs)
    like = Request((), sampling, grammar=grammar, continues=False)
    thinking = dialect.reasoning and text.rstrip().endswith(THINK)
    return Asked([(text, tuple(ids))], _requests(request, like, [tuple(ids)], opened, limits), thinking)


def _message(message: Said | Answered | Returned) -> dict[str, Any]:
    """As templates know it: content is a text, and the arguments of calls are values."""
    found: dict[str, Any] = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        found["content"] = "".join(part.text for part in message.content)
    found.setdefault("content", "")
    if found["role"] == "developer":  # OpenAI's newer name
        found["role"] = "system"
    for call in found.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the arguments of an earlier call are no JSON: {error}", param="messages") from error
    return found


def _spelled(value: Any) -> str:
    """As JSON, where all of it can be written.

    Raises:
        ApiError: half a character, which escapes within arguments and schemas can spell out.
    """
    try:
        return unicode(json.dumps(value, ensure_ascii=False))
    except ValueError as error:
        raise ApiError(400, f"messages or tools: {error}", param="messages") from error


def completion(request: CompletionRequest, opened: LanguageModel, limits: Limits) -> Asked:
    """A text, or several.

    Raises:
        ApiError: what the model cannot do.
    """
    most = request.max_tokens or min(DEFAULT_TOKENS, limits.max_new_tokens)
    special = request.finemoe.special
    if request.suffix is not None:
        prefix = str(request.prompt)
        check_length(prefix + request.suffix, opened, "prompt")
        try:
            ids, cut = middle_ids(opened, prefix, request.suffix, max(8, reach_of(opened) - most))
        except ConfigError as error:
            raise ApiError(400, str(error), param="suffix") from error
        if cut:
            raise ApiError(
                400, f"prompt and suffix are longer than {reach_of(opened):,} tokens leave room", param="suffix"
            )
        prompts = [(prefix, tuple(ids))]
    else:
        given: list[str | list[int]]
        whole: Any = request.prompt
        given = [whole] if isinstance(whole, str) or not whole or isinstance(whole[0], int) else whole
        if any(isinstance(one, int) for one in given):
            raise ApiError(400, MIXED, param="prompt")
        _check_choices(request, len(given), limits)  # before any is read
        prompts = [_prompt(one, opened, special) for one in given]
    room = min(_room(len(ids), most, opened, limits, "prompt") for _, ids in prompts)
    scored = request.logprobs if request.echo else None
    sampling = _sampling(request, room, request.logprobs or 0, prompt_logprobs=scored)
    routed = bool(request.return_routed_experts)
    if routed and not opened.model.moe_layers:
        raise ApiError(400, f"{request.model} has no routed experts: leave it out", param="return_routed_experts")
    like = Request((), sampling, grammar=_grammar(request, None), continues=True, experts=routed)
    return Asked(prompts, _requests(request, like, [ids for _, ids in prompts], opened, limits))


def _prompt(given: str | list[int], opened: LanguageModel, special: bool) -> tuple[str, tuple[int, ...]]:
    if isinstance(given, str):
        check_length(given, opened, "prompt")
        ids = opened.encode(given, special=special)
        return given, tuple(ids) or (opened.first_id,)
    size = opened.tokenizer.vocab_size
    outside = next((token for token in given if not 0 <= token < size), None)
    if outside is not None:
        raise ApiError(400, f"token id {outside} is outside the vocabulary of {size:,}", param="prompt")
    return opened.tokenizer.decode(given), tuple(given) or (opened.first_id,)


def check_length(text: str, opened: LanguageModel, param: str) -> None:
    """Refuse what cannot fit, before it is read: taking a long text apart costs a hundred times its size.

    Raises:
        ApiError: not even the longest tokens would spell so much within what the model reads.
    """
    reach = reach_of(opened)
    if len(text) > reach * opened.tokenizer.longest_token:
        raise ApiError(
            400,
            f"{len(text):,} characters are more than the {reach:,} tokens that the model reads could spell: shorten it",
            param=param,
            code="context_length_exceeded",
        )


def _room(prompt: int, most: int | None, opened: LanguageModel, limits: Limits, param: str) -> int:
    """Tokens that may be added."""
    reach = min(reach_of(opened), limits.max_prompt_tokens or reach_of(opened))
    if prompt >= reach:
        who = "the model" if reach == reach_of(opened) else "this server"
        raise ApiError(
            400,
            f"the prompt has {prompt:,} tokens, and {who} reads {reach:,} with what it adds: shorten it",
            param=param,
            code="context_length_exceeded",
        )
    if most is None:
        return min(limits.max_new_tokens, reach - prompt)
    if most > limits.max_new_tokens:
        raise ApiError(
            400, f"max_tokens {most:,} is above the {limits.max_new_tokens:,} of this server", param="max_tokens"
        )
    if prompt + most > reach:
        raise ApiError(
            400,
            f"{prompt:,} tokens of prompt and {most:,} to add are more than the {reach:,} that the model reads: ask "
            f"for {reach - prompt:,} or fewer, or shorten the prompt",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return most


def _sampling(request: Sampling, room: int, logprobs: int, prompt_logprobs: int | None = None) -> SamplingConfig:
    own = request.finemoe
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingConfig(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=own.top_k,
        top_p=request.top_p,
        min_p=own.min_p,
        repetition_penalty=own.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((int(token), bias) for token, bias in (request.logit_bias or {}).items())),
        seed=_seed(request),
        max_new_tokens=room,
        min_new_tokens=min(own.min_new_tokens, room),
        stop=stop,
        stop_ids=tuple(own.stop_ids),
        ignore_end=own.ignore_end,
        logprobs=logprobs,
        tempered_logprobs=own.tempered_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _seed(request: Sampling) -> int:
    if request.finemoe.seed is None:
        return secrets.randbits(62) if request.seed is None else request.seed
    if request.seed is not None:
        raise ApiError(400, "seed and finemoe.seed: give one of them", param="finemoe.seed")
    return int(request.finemoe.seed)


def _requests(
    request: Sampling, like: Request, prompts: Sequence[tuple[int, ...]], opened: LanguageModel, limits: Limits
) -> list[Request]:
    """A request of the engine for each choice."""
    n = _check_choices(request, len(prompts), limits)
    constraint = constraint_of(request.finemoe.experts, opened)
    own, deadline = request.finemoe, time.monotonic() + limits.max_seconds
    like = replace(like, constraint=constraint, deadline=deadline, routes=own.routing, guess=own.guess)
    numbers = range(own.first, own.first + n)
    return [replace(like, prompt=prompt, repetition=number) for prompt in prompts for number in numbers]


def _check_choices(request: Sampling, prompts: int, limits: Limits) -> int:
    """Completions of each prompt."""
    n = request.n or 1
    if n * prompts > limits.max_choices:
        said = f"{n * prompts} completions at once are more than the {limits.max_choices} of a request"
        raise ApiError(400, said, param="n")
    return n


def _grammar(request: Sampling, form: ResponseFormat | None) -> Grammar | None:
    """What the answer must be.

    Raises:
        ApiError: several things at once.
    """
    asked: dict[str, Any] = {}
    if form is not None and form.type == "json_object":
        asked["json_schema"] = {"type": "object"}
    if isinstance(form, SchemaFormat):
        asked["json_schema"] = form.json_schema.schema_
    if request.finemoe.regex is not None:
        asked["regex"] = request.finemoe.regex
    if request.finemoe.choice is not None:
        asked["choice"] = tuple(request.finemoe.choice)
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(400, f"give one of {', '.join(sorted(asked))}: an answer has one form", param="finemoe")
    return Grammar(**asked)


def weights(request: WeightsRequest, names: Sequence[str], below: Path | None) -> tuple[str, Path, str]:
    """For which of the models `names`, where weights lie, and what they are called.

    Args:
        request: asks for them.
        names: of all models that are served.
        below: folder in which weights may lie, and the tokenizer that belongs to them; None: there is none.

    Raises:
        ApiError: it may not be done; of what lies elsewhere nothing is told, not even whether it is there.
    """
    if below is None:
        raise ApiError(403, "weights stay as they are on this server: start it with --weights-below FOLDER")
    if request.model is None and len(names) > 1:
        raise ApiError(400, f"which model? This server has {', '.join(names)}", param="model")
    folder, asked = below.resolve(), request.model_path
    outside = ApiError(400, f"model_path must lie below {below}, as this server was started", param="model_path")
    try:
        path = (folder / asked).resolve()
        if path == folder or not path.is_relative_to(folder):
            raise outside
        if not text_home(path).resolve().is_relative_to(folder):
            said = f"the tokenizer of {asked} lies outside of {below}: start the server with the folder of the run"
            raise ApiError(400, said, param="model_path")
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name too long, a zero byte
        raise outside from None
    except CheckpointError as error:
        raise ApiError(400, str(error), param="model_path") from error
    return request.model or names[0], path, request.weight_version or path.name


def constraint_of(asked: ExpertsSchema | None, opened: LanguageModel) -> Constraint | None:
    """What holds for the experts, by layer; None where nothing is asked.

    Raises:
        ApiError: layers or experts that the model has not, or too few left to choose from.
    """
    if asked is None:
        return None
    disabled, forced = ({int(layer): ids for layer, ids in one.items()} for one in (asked.disabled, asked.forced))
    wish = Wish(disabled, forced, asked.active, asked.shared, asked.routed)
    try:
        return constrain(opened.model, wish)
    except ConfigError as error:
        raise ApiError(400, str(error), param="finemoe.experts") from error
