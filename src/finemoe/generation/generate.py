"""Generate: from the path of a model and prompts to completions. `finemoe generate` does the same, and streams."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch

from finemoe.checkpoint.language_model import LanguageModel, Weights, open_language_model
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.core.logs import logger, progress
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Request, engine_for
from finemoe.generation.grammar import Grammar
from finemoe.generation.sequence import FinishReason, Likely
from finemoe.generation.sequence import Sequence as Completed
from finemoe.generation.speculation import guesses_from

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, as chat templates read them."""

CACHE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
"""Types of the cache, by name."""


class Draw(TypedDict, total=False):
    """The fields of `SamplingConfig`, which says what each means, as `generate` takes them."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_ids: int | Sequence[int]
    ignore_end: bool
    min_new_tokens: int
    max_new_tokens: int
    seed: int
    logprobs: int


@dataclass(frozen=True)
class Completion:
    """What a model made of one prompt."""

    prompt: str
    completion: str
    finish_reason: FinishReason | None
    """`length`: it came to `max_new_tokens`; `stop`: the model ended the text, or wrote a stop string."""
    tokens: tuple[int, ...]
    """Ids of the completion."""
    logprobs: tuple[float, ...]
    """Of each of them under the model itself, in nats; with a grammar, among the tokens that it let through."""
    likely: tuple[Likely, ...] = ()
    """Beside each of them, ids and logprobs of the most probable ones, best first; where `logprobs` asked for them."""

    def __str__(self) -> str:
        return self.prompt + self.completion

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = asdict(self)
        return found if self.likely else {name: value for name, value in found.items() if name != "likely"}


def generate(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: str | Sequence[str] = (),
    *,
    messages: Sequence[Message] | None = None,
    n: int = 1,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    choice: Sequence[str] | None = None,
    guess: str | os.PathLike[str] | None = None,
    guess_tokens: int | None = None,
    weights: Weights = "auto",
    cache_dtype: Literal["fp32", "bf16", "fp8"] | None = None,
    cache_bytes: int | None = None,
    special: bool = False,
    quiet: bool = False,
    **sampling: Unpack[Draw],
) -> list[Completion]:
    """Continue prompts, or answer a conversation, with a trained model.

    Args:
        model: a run directory or one checkpoint in it, an imported or Hugging Face folder, a GGUF file; or what
            `open_language_model` made of one, which is then not read again.
        prompts: text to continue, one or several; each gets the text that it would get alone.
        messages: a conversation to answer instead, put into the model's chat template.
        n: completions of each, drawn independently; the prompt is read once.
        json_schema, regex, choice: what the completion must be, see `Grammar`; at most one of them.
        guess: where guesses of the next tokens come from: `text` (what came next the last time), `module` (the model's
            own multi-token prediction), or the path of a smaller model of the same tokenizer. The text stays the same.
        guess_tokens: at a time; None: 2 of the module, 4 of the others.
        weights: what they are in memory.
        cache_dtype, cache_bytes: of the cache; None: the weights', and a quarter of the free memory at most.
        special: read control tokens that a text spells out, such as <think>, as tokens and not as text.
        quiet: no progress on stderr.
        sampling: how tokens are drawn and when the text ends, as in `SamplingConfig`: temperature (0 always takes the
            most probable token), top_k, top_p, min_p, stop, seed, max_new_tokens, logprobs and others.

    Returns `n` completions of each prompt, or `n` answers, whose `prompt` is the conversation in its template.

    Raises:
        ConfigError: nothing to continue, prompts and messages at once, impossible sampling, grammar or guesses.
        FinemoeError: nothing that can be opened, or no chat template.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if bool(texts) == (messages is not None):
        raise ConfigError("nothing to continue: give prompts or messages" if not texts else "give prompts or messages")
    drawn = parse(SamplingConfig, sampling, "generate")
    grammar = grammar_of({"json_schema": json_schema, "regex": regex, "choice": choice})
    check_counts(n, guess_tokens)
    opened = model if isinstance(model, LanguageModel) else open_language_model(model, weights)
    asked = [(text, opened.encode(text, special=special)) for text in texts]
    if messages is not None:
        asked = [opened.encode_chat(messages, special=special)]
    ids = [tuple(found) for _, found in asked]
    engine = engine_with(opened, guess, guess_tokens, cache_dtype, cache_bytes)
    sequences = complete(engine, ids, drawn, n=n, grammar=grammar, answers=messages is not None, quiet=quiet)
    if guess is not None and not quiet:
        logger.info("%s", engine.acceptance)
    return [completion(asked[number // n][0], one) for number, one in enumerate(sequences)]


def grammar_of(given: Mapping[str, Any]) -> Grammar | None:
    """What `json_schema`, `regex` and `choice` of `given` ask for; None where they are None.

    Raises:
        ConfigError: several of them at once, a schema that is no JSON, or no text to choose.
    """
    asked = {name: given[name] for name in ("json_schema", "regex", "choice") if given[name] is not None}
    return parse(Grammar, asked, "generate") if asked else None


def check_counts(n: int, guess_tokens: int | None) -> None:
    """Both are at least 1.

    Raises:
        ConfigError: one is not.
    """
    if n < 1:
        raise ConfigError(f"n: {n} completions of a prompt cannot be drawn; ask for 1 or more")
    if guess_tokens is not None and guess_tokens < 1:
        raise ConfigError(f"guess_tokens: {guess_tokens} is not a number of tokens to guess; give 1 or more")


def engine_with(
    opened: LanguageModel,
    guess: str | os.PathLike[str] | None = None,
    guess_tokens: int | None = None,
    cache_dtype: str | None = None,
    cache_bytes: int | None = None,
) -> Engine:
    """An engine as the arguments of `generate` ask for.

    Raises:
        ConfigError: guesses that cannot be made, or a type of the cache that is none.
        DataError: a cache too small for one block.
    """
    if cache_dtype is not None and cache_dtype not in CACHE:
        raise ConfigError(f"cache_dtype must be one of {', '.join(CACHE)}, not {cache_dtype!r}")
    if guess is None and guess_tokens is not None:
        raise ConfigError("guess_tokens goes with guess: say where guesses come from")
    guesses = guesses_from(guess, opened, guess_tokens) if guess is not None else None
    kind = CACHE[cache_dtype] if cache_dtype is not None else None
    return engine_for(opened, guesses=guesses, cache_bytes=cache_bytes, cache_dtype=kind)


def complete(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    *,
    n: int = 1,
    grammar: Grammar | None = None,
    answers: bool = False,
    quiet: bool = False,
) -> list[Completed]:
    """`n` completions of each prompt, in order, with progress on stderr; `answers` begin texts of their own."""
    template = Request((), sampling, grammar=grammar, continues=not answers)
    order = engine.submit_all([prompt for prompt in prompts for _ in range(n)], template)
    done: dict[int, Completed] = {}
    with nullcontext(lambda _: None) if quiet else progress("generating", len(order), "completions") as advance:
        for event in engine.events():
            if event.finish_reason is not None:
                done[event.sequence.id] = event.sequence
                advance(1)
    return [done[i] for i in order]


def completion(prompt: str, sequence: Completed) -> Completion:
    """A finished sequence of an engine that knows its tokenizer."""
    written = "" if sequence.text is None else sequence.text.text
    likely = tuple(sequence.likely) if sequence.sampling.logprobs else ()
    ids, logprobs = tuple(sequence.completion), tuple(sequence.logprobs)
    return Completion(prompt, written, sequence.finish_reason, ids, logprobs, likely)
