"""Generate: from the path of a model and prompts to completions. `finemoe generate` does the same, and streams."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from finemoe.checkpoint.language_model import Dtype, LanguageModel, open_language_model
from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.core.logs import progress
from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Event, engine_for
from finemoe.generation.sequence import FinishReason
from finemoe.generation.sequence import Sequence as Completed
from finemoe.generation.text import TextStream
from finemoe.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, as chat templates read them."""

DRAW = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "min_new_tokens",
    "max_new_tokens",
    "seed",
)
"""What of `SamplingConfig` can be said to `generate` and `finemoe generate`."""


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
    """Of each of them under the model itself, in nats."""

    def __str__(self) -> str:
        return self.prompt + self.completion

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def generate(
    model: str | os.PathLike[str] | LanguageModel,
    prompts: str | Sequence[str] = (),
    *,
    messages: Sequence[Message] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: str | Sequence[str] = (),
    min_new_tokens: int = 0,
    seed: int = 0,
    dtype: Dtype = "fp32",
    special: bool = False,
    quiet: bool = False,
) -> list[Completion]:
    """Continue prompts, or answer a conversation, with a trained model.

    Args:
        model: a run directory or one checkpoint in it, an imported or Hugging Face folder, a GGUF file; or what
            `open_language_model` made of one, which is then not read again.
        prompts: text to continue, one or several; each gets the text that it would get alone.
        messages: a conversation to answer instead, put into the model's chat template.
        max_new_tokens, min_new_tokens: most tokens to add, and how many before the text may end.
        temperature: 0 always takes the most probable token.
        top_k, top_p: draw among the K most probable tokens, or among the fewest that reach P.
        min_p: draw among tokens at least this many times as probable as the most probable one.
        repetition_penalty, presence_penalty, frequency_penalty: see `SamplingConfig`; against what was there.
        stop: strings that end the text, which leaves them out.
        seed: equal seeds give equal text.
        dtype: of the weights in memory.
        special: read control tokens that the text spells out, such as <think>, as those tokens and not as text.
        quiet: no progress on stderr.

    Returns:
        A completion for each prompt, or the one answer, whose `prompt` is the conversation as the template wrote it.

    Raises:
        ConfigError: nothing to continue, prompts and messages at once, or impossible sampling.
        FinemoeError: nothing that can be opened, or no chat template.
    """
    given = locals()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if bool(texts) == (messages is not None):
        raise ConfigError("nothing to continue: give prompts or messages" if not texts else "give prompts or messages")
    sampling = parse(SamplingConfig, {name: given[name] for name in DRAW}, "generate")
    opened = model if isinstance(model, LanguageModel) else open_language_model(model, dtype)
    if messages is None:
        ids = [tuple(opened.encode(text, special=special)) for text in texts]
    else:
        text, answered = opened.encode_chat(messages, special=special)
        texts, ids = [text], [tuple(answered)]
    answers = messages is not None
    sequences = complete(engine_for(opened), ids, sampling, opened.tokenizer, answers, quiet=quiet)
    return [completion(text, one, opened.tokenizer, answers) for text, one in zip(texts, sequences, strict=True)]


def complete(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    answers: bool = False,
    *,
    quiet: bool = False,
) -> list[Completed]:
    """Complete all prompts, in order, with progress on stderr; `answers` as in `text_stream`."""
    order = engine.submit_all(prompts, sampling)
    texts = {number: text_stream(tokenizer, sampling, answers) for number in order}
    done: dict[int, Completed] = {}
    with nullcontext(lambda _: None) if quiet else progress("generating", len(prompts), "prompts") as advance:
        for event in engine.events():
            write(texts[event.sequence.id], event)
            if event.sequence.finish_reason is not None:
                done[event.sequence.id] = event.sequence
                advance(1)
    return [done[i] for i in order]


def text_stream(tokenizer: Tokenizer, sampling: SamplingConfig, answers: bool = False) -> TextStream:
    """For the text of a completion. `answers`: it begins a text of its own rather than continue the prompt's."""
    decoder = tokenizer.decoder(continues=not answers)
    return TextStream(decoder, sampling.stop, min_tokens=sampling.min_new_tokens)


def write(text: TextStream, event: Event) -> str:
    """What a token makes certain of its text, all of the rest with the last. A stop string ends the sequence."""
    sequence = event.sequence
    piece = "" if sequence.finish_reason == "stop" else text.push(event.token_id)
    if text.stopped is not None:
        sequence.stop(text.stopped)
    return piece + (text.finish() if sequence.finish_reason is not None else "")


def completion(prompt: str, sequence: Completed, tokenizer: Tokenizer, answers: bool = False) -> Completion:
    """A finished sequence as text; `answers` as in `text_stream`."""
    text = text_stream(tokenizer, sequence.sampling, answers)
    for token_id in sequence.text_ids:
        text.push(token_id)
    text.finish()
    return Completion(prompt, text.text, sequence.finish_reason, tuple(sequence.completion), tuple(sequence.logprobs))
