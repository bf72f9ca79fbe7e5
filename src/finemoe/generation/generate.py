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
from finemoe.generation.engine import Engine, engine_for
from finemoe.generation.sampling import SamplingConfig
from finemoe.generation.sequence import FinishReason
from finemoe.generation.sequence import Sequence as Completed
from finemoe.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, as chat templates read them."""


@dataclass(frozen=True)
class Completion:
    """What a model made of one prompt."""

    prompt: str
    completion: str
    finish_reason: FinishReason | None
    """`length`: it came to `max_new_tokens`; `stop`: the model ended the text."""
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
        max_new_tokens: most tokens to add.
        temperature: 0 always takes the most probable token.
        top_k, top_p: draw among the K most probable tokens, or among the fewest that reach P.
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
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if bool(texts) == (messages is not None):
        raise ConfigError("nothing to continue: give prompts or messages" if not texts else "give prompts or messages")
    draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "max_new_tokens": max_new_tokens}
    sampling = parse(SamplingConfig, draw, "generate")
    opened = model if isinstance(model, LanguageModel) else open_language_model(model, dtype)
    if messages is None:
        ids = [tuple(opened.encode(text, special=special)) for text in texts]
    else:
        text, answered = opened.encode_chat(messages, special=special)
        texts, ids = [text], [tuple(answered)]
    sequences = complete(engine_for(opened), ids, sampling, quiet=quiet)
    answers = messages is not None
    return [completion(text, one, opened.tokenizer, answers) for text, one in zip(texts, sequences, strict=True)]


def complete(
    engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: SamplingConfig, *, quiet: bool = False
) -> list[Completed]:
    """Complete all prompts, in order, with progress on stderr."""
    order = engine.submit_all(prompts, sampling)
    done: dict[int, Completed] = {}
    with nullcontext(lambda _: None) if quiet else progress("generating", len(prompts), "prompts") as advance:
        for event in engine.events():
            if event.sequence.finish_reason is not None:
                done[event.sequence.id] = event.sequence
                advance(1)
    return [done[i] for i in order]


def completion(prompt: str, sequence: Completed, tokenizer: Tokenizer, answers: bool = False) -> Completion:
    """A finished sequence as text; `answers`: it begins a text of its own rather than continue the prompt's."""
    return Completion(
        prompt,
        tokenizer.decode(sequence.text_ids, continues=not answers),
        sequence.finish_reason,
        tuple(sequence.completion),
        tuple(sequence.logprobs),
    )
