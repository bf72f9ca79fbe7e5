"""Engine: many prompts through one model at once, in a fixed number of slots.

Every step is one forward pass over all slots. A slot feeds a chunk of its prompt, or the token it drew last;
shorter rows are padded, and the padding is written to cache positions that its row cannot see. A finished
slot takes the next sequence of the queue. Nothing is evicted: a cache has room for the longest that waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.core.errors import DataError
from finemoe.generation.sampling import SamplingConfig, pick
from finemoe.generation.sequence import Sequence
from finemoe.model.attention import AttentionCache
from finemoe.model.transformer import Transformer


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
        prefill_chunk: int = 256,
    ) -> None:
        """Wrap `model`.

        Args:
            model: in eval mode, on its device, in its precision.
            end_of_text_id: stops completions and begins empty prompts; None: neither.
            stop_ids: stop completions too, such as the end of a turn.
            vocab_size: ids from here on are never drawn, for tokenizers smaller than the model's vocabulary.
            num_slots: most sequences in one forward pass.
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
        self._slots: list[Sequence | None] = []
        self._cache: list[AttentionCache] = []
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
        while self._queue or any(self._slots):
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward pass: the tokens it drew. Empty while prompts are being read, or when all is done."""
        self._admit()
        active = [(slot, sequence) for slot, sequence in enumerate(self._slots) if sequence is not None]
        if not active:
            return []
        chunks = {slot: sequence.pending(self._chunk) for slot, sequence in active}
        hidden = self._forward(chunks)
        ready = []
        for slot, sequence in active:
            sequence.num_cached += len(chunks[slot])
            if sequence.num_cached >= len(sequence.prompt):
                ready.append((slot, sequence))
        if not ready:
            return []
        rows = [slot for slot, _ in ready]
        last = hidden[rows, [len(chunks[slot]) - 1 for slot in rows]]
        logits = self._model.logits(last)[:, : self._vocab_size]
        events = [Event(sequence, *drawn) for (_, sequence), drawn in zip(ready, _draw(logits, ready), strict=True)]
        for slot, event in zip(rows, events, strict=True):
            event.sequence.append(event.token_id, event.logprob, self._stop_ids)
            if event.sequence.finish_reason is not None:
                self._slots[slot] = None
        return events

    def _forward(self, chunks: Mapping[int, list[int]]) -> Tensor:
        """Hidden states [slots, width, hidden] of `chunks`, which start where their slots' caches end."""
        width = max(len(chunk) for chunk in chunks.values())
        tokens = torch.zeros(len(self._slots), width, dtype=torch.int64)
        starts = torch.zeros(len(self._slots), 1, dtype=torch.int64)
        for slot, sequence in enumerate(self._slots):
            if sequence is not None:
                tokens[slot, : len(chunks[slot])] = torch.tensor(chunks[slot])
                starts[slot] = sequence.num_cached
        device = self._model.head_weight.device
        positions = (starts + torch.arange(width)).to(device)
        return self._model(tokens.to(device), positions=positions, cache=self._cache).hidden

    def _admit(self) -> None:
        """Fill free slots from the queue, in order. What does not fit the cache waits until all are free."""
        if self._queue and not any(self._slots):
            self._capacity = max(_tokens_cached(sequence) for sequence in self._queue)
            self._chunk = min(self._prefill_chunk, max(len(sequence.prompt) for sequence in self._queue))
            self._slots = [None] * min(self._num_slots, len(self._queue))
            # A row at the end of its capacity may be padded to the width of a chunk.
            self._cache = self._model.new_cache(len(self._slots), self._capacity + self._chunk - 1)
        for slot, occupant in enumerate(self._slots):
            if occupant is None and self._queue and _tokens_cached(self._queue[0]) <= self._capacity:
                self._slots[slot] = self._queue.popleft()


def _tokens_cached(sequence: Sequence) -> int:
    """Most tokens of a sequence that reach the cache: its last one is drawn, never read."""
    return len(sequence.prompt) + sequence.sampling.max_new_tokens - 1


def _draw(logits: Tensor, ready: list[tuple[int, Sequence]]) -> list[tuple[int, float]]:
    """Token and logprob for each row of `logits [rows, vocab]`, rows with equal parameters together."""
    groups: dict[SamplingConfig, list[int]] = {}
    for row, (_, sequence) in enumerate(ready):
        groups.setdefault(sequence.sampling, []).append(row)
    drawn: dict[int, tuple[int, float]] = {}
    for sampling, rows in groups.items():
        ids, logprobs = pick(logits[rows], sampling, [ready[row][1].generator for row in rows])
        drawn.update(zip(rows, zip(ids.tolist(), logprobs.tolist(), strict=True), strict=True))
    return [drawn[row] for row in range(len(ready))]
