"""Engine: many prompts through one model at once, in a fixed number of slots.

In every step a sequence feeds a chunk of its prompt, or the token it drew last. Those that feed about as much share
a forward pass: shorter rows are padded, and the padding is written to cache positions that its row cannot see. A
finished sequence makes room for the next of the queue. Nothing is evicted: a cache has room for the longest that waits.

Sequences that run are rows 0, 1, ... of the cache, in the order of how much they feed, so that every pass reads and
writes a slice of it; rows change places where that order changes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import DataError
from finemoe.generation.sampling import SamplingConfig, pick
from finemoe.generation.sequence import Sequence
from finemoe.model.attention import AttentionCache
from finemoe.model.transformer import Transformer

_MOST_PADDING = 32
"""Tokens of padding in one pass, all rows together. A pass of its own costs more than that: it reads every weight."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    """Token ids; empty means: begin a text."""
    sampling: SamplingConfig
    repetition: int = 0
    """Requests that differ only in this draw different completions."""


@dataclass(frozen=True)
class Event:
    """A token was drawn."""

    sequence: Sequence
    """Which it was added to; `finish_reason` is set when it was the last."""
    token_id: int
    logprob: float


class Engine:
    """Runs requests. The model is only read; sampling parameters may differ between requests.

    A completion depends on its request alone, up to floating-point rounding: the last bit of a matrix product
    may depend on the batch size.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        end_of_text_id: int | None = None,
        stop_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        num_slots: int = 8,
        prefill_chunk: int = 512,
    ) -> None:
        """Wrap `model`.

        Args:
            model: in eval mode, on its device, in its precision.
            end_of_text_id: stops completions and begins empty prompts; None: neither.
            stop_ids: stop completions too, such as the end of a turn.
            vocab_size: ids from here on are never drawn, for tokenizers smaller than the model's vocabulary.
            num_slots: most sequences that run at once.
            prefill_chunk: most tokens of one prompt in one forward pass.

        Raises:
            ValueError: the model is in training mode.
        """
        if model.training:
            raise ValueError("the model is in training mode, where experts may drop tokens: call model.eval() first")
        self._model = model
        self._end_of_text_id = end_of_text_id
        self._stop_ids = frozenset(stop_ids) | ({end_of_text_id} if end_of_text_id is not None else set())
        self._vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self._num_slots = num_slots
        self._prefill_chunk = prefill_chunk
        self._queue: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._cache: list[AttentionCache] = []
        self._rows = 0  # of the cache
        self._capacity = 0  # tokens of one sequence that the cache can hold
        self._chunk = 1  # widest forward pass that the cache has room for
        self._next_id = 0

    def submit(self, request: Request) -> int:
        """Queue a request; the id of its sequence.

        Raises:
            DataError: a token id outside the vocabulary, or an empty prompt without an end-of-text token.
        """
        prompt = request.prompt
        if not prompt:
            if self._end_of_text_id is None:
                raise DataError("an empty prompt needs an end-of-text token to start from: give end_of_text_id")
            prompt = (self._end_of_text_id,)
        outside = next((i for i in prompt if not 0 <= i < self._model.config.vocab_size), None)
        if outside is not None:
            raise DataError(f"token id {outside} is outside the model's vocabulary of {self._model.config.vocab_size}")
        self._queue.append(Sequence.start(self._next_id, prompt, request.sampling, request.repetition))
        self._next_id += 1
        return self._next_id - 1

    def generate(self, prompts: Iterable[tuple[int, ...]], sampling: SamplingConfig) -> list[Sequence]:
        """Complete every prompt, in order. A prompt given n times is drawn n times, independently."""
        done: dict[int, Sequence] = {}
        ids = self.submit_all(prompts, sampling)
        for event in self.events():
            done[event.sequence.id] = event.sequence
        return [done[i] for i in ids]

    def submit_all(self, prompts: Iterable[tuple[int, ...]], sampling: SamplingConfig) -> list[int]:
        """`submit` each prompt, the n-th copy of one as its n-th repetition."""
        seen: Counter[tuple[int, ...]] = Counter()
        ids = []
        for prompt in prompts:
            ids.append(self.submit(Request(prompt, sampling, seen[prompt])))
            seen[prompt] += 1
        return ids

    def events(self) -> Iterator[Event]:
        """`step` until nothing is left, token by token."""
        while self._queue or self._running:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Every running sequence once: the tokens drawn. Empty while prompts are being read, or when all is done."""
        self._leave()  # those that were stopped from outside
        self._admit()
        chunks = self._arrange()
        hidden, ready = [], []
        for first, last in _passes([len(chunk) for chunk in chunks]):
            states = self._forward(chunks[first:last], first)
            for row, sequence in enumerate(self._running[first:last], first):
                sequence.num_cached += len(chunks[row])
                if sequence.num_cached >= len(sequence.prompt):
                    hidden.append(states[row - first, len(chunks[row]) - 1])
                    ready.append(sequence)
        if not ready:
            return []
        logits = self._model.logits(torch.stack(hidden))[:, : self._vocab_size]
        events = [
            Event(sequence, *drawn) for sequence, drawn in zip(ready, _draw(logits, ready, self._stop_ids), strict=True)
        ]
        for event in events:
            event.sequence.append(event.token_id, event.logprob, self._stop_ids)
        self._leave()
        return sorted(events, key=lambda event: event.sequence.id)

    def _arrange(self) -> list[list[int]]:
        """What each running sequence feeds next; those that feed more are moved behind those that feed less."""
        chunks = [sequence.pending(self._chunk) for sequence in self._running]
        for row, chunk in enumerate(chunks):
            least = min(reversed(range(row, len(chunks))), key=lambda other: len(chunks[other]))
            if len(chunks[least]) < len(chunk):
                self._swap(row, least)
                chunks[row], chunks[least] = chunks[least], chunk
        return chunks

    def _forward(self, chunks: list[list[int]], row: int) -> Tensor:
        """Hidden states [chunks, width, hidden] of the sequences from `row` on, each from where its cache ends."""
        width = max(len(chunk) for chunk in chunks)
        tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks])
        starts = torch.tensor([[self._running[row + i].num_cached] for i in range(len(chunks))])
        device = self._model.head_weight.device
        positions = (starts + torch.arange(width)).to(device)
        cache = self._cache
        if len(chunks) < self._rows:
            cache = [layer.rows(row, row + len(chunks)) for layer in cache]
        return self._model(tokens.to(device), positions=positions, cache=cache).hidden

    def _admit(self) -> None:
        """Fill free slots from the queue, in order. What does not fit the cache waits until all are free."""
        if self._queue and not self._running:
            self._capacity = max(_tokens_cached(sequence) for sequence in self._queue)
            self._chunk = min(self._prefill_chunk, max(len(sequence.prompt) for sequence in self._queue))
            self._rows = min(self._num_slots, len(self._queue))
            # A row at the end of its capacity may be padded.
            room = self._capacity + min(self._chunk - 1, _MOST_PADDING)
            self._cache = self._model.new_cache(self._rows, room)
        while len(self._running) < self._rows and self._queue and _tokens_cached(self._queue[0]) <= self._capacity:
            self._running.append(self._queue.popleft())

    def _leave(self) -> None:
        """Finished sequences go; the last takes the row of one that does."""
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is not None:
                last = len(self._running) - 1
                if row != last:
                    self._swap(row, last)
                self._running.pop()

    def _swap(self, row: int, other: int) -> None:
        self._running[row], self._running[other] = self._running[other], self._running[row]
        for layer in self._cache:
            layer.swap(row, other)


def engine_for(opened: LanguageModel) -> Engine:
    """An engine for a model as it was opened: it stops where the model's own tokenizer ends a text or a turn."""
    tokenizer = opened.tokenizer
    return Engine(
        opened.model,
        end_of_text_id=tokenizer.end_of_text_id,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
    )


def _passes(widths: list[int]) -> Iterator[tuple[int, int]]:
    """Rows first ... last - 1 of each forward pass; `widths` ascend."""
    first = 0
    for row in range(1, len(widths) + 1):
        if row == len(widths) or sum(widths[row] - width for width in widths[first:row]) > _MOST_PADDING:
            yield first, row
            first = row


def _tokens_cached(sequence: Sequence) -> int:
    """Most tokens of a sequence that reach the cache: its last one is drawn, never read."""
    return len(sequence.prompt) + sequence.sampling.max_new_tokens - 1


def _draw(logits: Tensor, ready: list[Sequence], stop_ids: frozenset[int]) -> list[tuple[int, float]]:
    """Token and logprob for each row of `logits [rows, vocab]`, rows with equal parameters together."""
    groups: dict[SamplingConfig, list[int]] = {}
    for row, sequence in enumerate(ready):
        groups.setdefault(sequence.sampling, []).append(row)
    drawn: dict[int, tuple[int, float]] = {}
    for sampling, rows in groups.items():
        chosen = logits if len(rows) == len(ready) else logits[rows]
        contexts = [ready[row].context(stop_ids) for row in rows]
        ids, logprobs = pick(chosen, sampling, [ready[row].generator for row in rows], contexts)
        drawn.update(zip(rows, zip(ids.tolist(), logprobs.tolist(), strict=True), strict=True))
    return [drawn[row] for row in range(len(ready))]
