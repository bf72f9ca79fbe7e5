"""Completions for the requests of a task: prompts to ids, strings that stop, and what was cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.evaluation.task import Generate, Generated
from finemoe.generation import Request, SamplingConfig, engine_for
from finemoe.generation.scoring import middle_ids, reach_of


@dataclass
class _Request:
    """A request and its completions so far."""

    request: Generate
    prompt: tuple[int, ...]
    truncated: bool
    room: int
    """Most tokens to write."""
    texts: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    unfinished: int = 0


def generate(
    opened: LanguageModel, requests: Mapping[str, Generate], seed: int
) -> Iterator[tuple[str, Generated, int]]:
    """Key, answer and tokens read and written of each request, as they come out.

    Raises:
        ConfigError: a gap to fill, and a tokenizer without the tokens for it.
    """
    asked = {key: _prepare(opened, request) for key, request in requests.items()}
    waiting = [(key, sample) for key, own in asked.items() for sample in range(own.request.samples)]
    # The longest first keeps passes full to the end.
    waiting.sort(key=lambda one: -len(asked[one[0]].prompt) - asked[one[0]].room)
    engine = engine_for(opened, steady=True)
    owner: dict[int, tuple[str, int]] = {}
    for key, sample in waiting:
        own = asked[key]
        sampling = SamplingConfig(
            temperature=own.request.temperature, seed=seed, max_new_tokens=own.room, stop=own.request.stops
        )
        number = engine.submit(Request(own.prompt, sampling, sample))
        owner[number] = key, sample
    for event in engine.events():
        sequence = event.sequence
        if sequence.finish_reason is None or sequence.text is None:
            continue
        key, sample = owner[sequence.id]
        own = asked[key]
        own.texts[sample] = sequence.text.text
        own.tokens += len(sequence.completion)
        own.unfinished += sequence.finish_reason == "length"
        if len(own.texts) == own.request.samples:
            texts = tuple(own.texts[i] for i in range(own.request.samples))
            read = len(own.prompt) * own.request.samples + own.tokens
            yield key, Generated(texts, own.tokens, own.truncated, own.unfinished), read


def _prepare(opened: LanguageModel, request: Generate) -> _Request:
    """The prompt in ids. It loses tokens from the left where it and the answer are longer than the model.

    Of a model too short for both, the answer gets at least half.
    """
    reach = reach_of(opened)
    if request.suffix is not None:
        room = max(1, min(request.max_new_tokens, reach // 2))
        filled, cut = middle_ids(opened, request.prompt, request.suffix, max(1, reach - room))
        return _Request(request, tuple(filled), cut, room)
    ids = opened.encode(request.prompt)
    room = max(1, min(request.max_new_tokens, max(reach // 2, reach - len(ids))))
    kept = max(1, reach - room)
    return _Request(request, tuple(ids[-kept:]) or (opened.first_id,), len(ids) > kept, room)
