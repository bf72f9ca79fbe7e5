"""Engine: many requests through one model at once. It ties together who goes next, what the model says, and the draw.

In every step each sequence that decodes feeds the token it drew last, and what is left of the pass goes to prompts, in
pieces (`scheduler.py`); all of it is one flat pass over a cache in blocks (`runner.py`). Tokens that were guessed to
follow are fed along, and kept as far as the draw agrees (`speculation.py`): the text is the one that would have come
anyway, in fewer passes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError, DataError
from finemoe.generation.blocks import BlockPool
from finemoe.generation.config import SamplingConfig
from finemoe.generation.drawing import draw, score_prompt
from finemoe.generation.grammar import Grammar, Grammars
from finemoe.generation.runner import BLOCK_SIZE, Runner, States, blocks_for
from finemoe.generation.salts import SALT, salt_of
from finemoe.generation.scheduler import Feed, Scheduler
from finemoe.generation.sequence import Constraint, FinishReason, Likely, Sequence
from finemoe.generation.speculation import Acceptance, Guesses
from finemoe.generation.text import TextStream
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    """Token ids; empty means: begin a text."""
    sampling: SamplingConfig
    repetition: int = 0
    """Requests that differ only in this draw different completions."""
    parent: int | None = None
    """The number of a sequence with the same prompt and constraint, which is then read once for both."""
    constraint: Constraint | None = None
    """What holds for its experts, by layer; neighbours are not touched by it."""
    grammar: Grammar | None = None
    """What the completion must be: JSON of a schema, a regular expression, one of several texts."""
    experts: bool = False
    """Keep which experts each token chose: `Sequence.experts`."""
    continues: bool = True
    """Its text goes on where the prompt's ends; False: it begins one of its own, as an answer does."""
    deadline: float | None = None
    """`time.monotonic()` at which it ends where it is."""
    routes: bool = False
    """Report the experts that each of its tokens came out of: `Event.routes`."""
    guess: str | None = None
    """Which of the engine's sources of guesses it takes, where the engine has several (`Chosen`)."""


@dataclass(frozen=True)
class Route:
    """The experts of one layer that a token came out of: those of the token before it, which said what comes."""

    experts: tuple[int, ...]
    """Best first."""
    gates: tuple[float, ...]
    """What their outputs were weighed by."""
    shared: float | None
    """Share of the shared experts in the layer's output, 0 to 1; None without them."""


@dataclass(frozen=True)
class Event:
    """A token was drawn."""

    sequence: Sequence
    """Which it was added to; by the time that somebody looks it may have gone on."""
    token_id: int
    logprob: float
    likely: Likely = ()
    """The most probable tokens in its place, where they were asked for."""
    text: str = ""
    """What it makes certain of the text: whole characters, and nothing that a stop string may still take back."""
    routes: Mapping[int, Route] = field(default_factory=dict)
    """By layer, where they were asked for."""
    finish_reason: FinishReason | None = None
    """Why the sequence ended with this token; None where it goes on."""


class Engine:
    """Runs requests. The model is only read; sampling parameters may differ between requests.

    A completion depends on its request alone, up to floating-point rounding: the last bit of a matrix product
    may depend on the batch size. With `steady` on a CPU in float32 with the native kernels, not even that.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        end_of_text_id: int | None = None,
        stop_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: torch.dtype | None = None,
        block_size: int = BLOCK_SIZE,
        max_sequences: int = 32,
        max_tokens: int = 512,
        chunk: int = 256,
        reuse: bool = True,
        steady: bool = False,
        guesses: Guesses | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Wrap `model`.

        Args:
            model: in eval mode, on its device, in its precision.
            end_of_text_id: stops completions and begins empty prompts; None: neither.
            stop_ids: stop completions too, such as the end of a turn.
            vocab_size: ids from here on are never drawn; nor are those that the tokenizer does not know.
            cache_bytes: for the cache; None: a quarter of the memory that is free, and no more than is of use.
            cache_dtype: of the cache, such as torch.bfloat16 or torch.float8_e4m3fn; None: the weights'.
            block_size: tokens of a block.
            max_sequences, max_tokens, chunk: most that run at once, most tokens of one pass, and of one prompt in it.
            reuse: a prompt that begins as an earlier one did is read from where they part.
            steady: what a request gets does not depend on its neighbours, to the last bit, at the price of speed.
            guesses: where guesses of the next tokens come from.
            tokenizer: of the model; without it there are no texts, stop strings and grammars.

        Raises:
            ValueError: the model is in training mode, or `steady` together with `guesses`.
            DataError: no room for a block.
        """
        if model.training:
            raise ValueError("the model is in training mode, where experts may drop tokens: call model.eval() first")
        if steady and guesses is not None:
            raise ValueError("steady passes all have one shape, and guesses would change it: choose one of them")
        self._model = model
        self._end_of_text_id = end_of_text_id
        self._stop_ids = frozenset(stop_ids) | ({end_of_text_id} if end_of_text_id is not None else set())
        known = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self._vocab_size = min(vocab_size or known, known, model.config.vocab_size)
        blocks = blocks_for(model, block_size, cache_dtype, cache_bytes)
        self._runner = Runner(model, blocks, block_size, dtype=cache_dtype, steady=steady)
        self._pool = pool = BlockPool(blocks, block_size, reuse=reuse and not steady)
        if steady:  # prompts are read whole, and once: read again with what followed, they would round otherwise
            max_tokens = chunk = blocks * block_size
        self._scheduler = Scheduler(
            pool, max_sequences=max_sequences, max_tokens=max_tokens, chunk=chunk, put_back=not steady
        )
        self._guesses, self._steady, self._tokenizer = guesses, steady, tokenizer
        self._requests: dict[int, Request] = {}
        self._sequences: dict[int, Sequence] = {}
        self._next_id, self.acceptance = 0, Acceptance()
        self.ended: list[Sequence] = []  # in the last step, or cancelled since: also those of whom there is no event

    def submit(self, request: Request) -> int:
        """Queue a request; the id of its sequence.

        Raises:
            DataError: a token id outside the vocabulary, an empty prompt without an end-of-text token, or more tokens
                than the cache has room for.
            ConfigError: a grammar that cannot be followed, or the package for it is missing; a grammar or a stop string
                and no tokenizer.
        """
        prompt = request.prompt
        if not prompt:
            if self._end_of_text_id is None:
                raise DataError("an empty prompt needs an end-of-text token to start from: give end_of_text_id")
            prompt = (self._end_of_text_id,)
        outside = next((i for i in prompt if not 0 <= i < self._model.config.vocab_size), None)
        if outside is not None:
            raise DataError(f"token id {outside} is outside the model's vocabulary of {self._model.config.vocab_size}")
        sequence = Sequence.start(self._next_id, prompt, request.sampling, request.repetition)
        sequence.salt = salt_of(request.constraint)
        if request.constraint is not None:  # those with the very same object share their passes
            alike = (one.constraint for one in self._sequences.values() if one.salt[:SALT] == sequence.salt)
            sequence.constraint = next(alike, request.constraint)
        if request.grammar is not None:
            sequence.grammar = self._grammars.start(request.grammar)
        sequence.text, sequence.guess = self._text(request), request.guess
        if request.guess is not None:  # a prediction module has read what its own requests have read
            sequence.salt += b" guessed by " + request.guess.encode()
        parent = self._sequences.get(request.parent) if request.parent is not None else None
        if request.experts or request.sampling.prompt_logprobs is not None:  # all of its prompt has to be read
            sequence.salt += self._alone(sequence, request, parent)
        if parent is not None and not self._steady and (parent.prompt, parent.salt) == (prompt, sequence.salt):
            sequence.parent = parent
        self._scheduler.add(sequence)
        self._requests[sequence.id], self._sequences[sequence.id] = request, sequence
        self._next_id += 1
        return sequence.id

    def _alone(self, sequence: Sequence, request: Request, parent: Sequence | None) -> bytes:
        """What keeps its blocks apart: from all but a parent that read the same prompt and kept its experts."""
        if parent is not None and request.sampling.prompt_logprobs is None and not self._steady:
            told = b" alone %d" % parent.id
            if self._requests[parent.id].experts and (parent.prompt, parent.salt) == (
                sequence.prompt,
                sequence.salt + told,
            ):
                return told
        return b" alone %d" % sequence.id

    def cancel(self, id: int) -> bool:
        """End a request where it is, and free what it held; False where there is none of that number any more."""
        sequence = self._sequences.get(id)
        if sequence is None:
            return False
        self._end(sequence, "cancelled")
        return True

    def forget(self) -> None:
        """Read every text anew from now on, as where weights have changed; nothing may run."""
        assert not self.busy
        self._pool.forget()

    def generate(self, prompts: Iterable[tuple[int, ...]], sampling: SamplingConfig) -> list[Sequence]:
        """Complete every prompt, in order. A prompt given n times is drawn n times, independently."""
        ids = self.submit_all(prompts, Request((), sampling))
        done = {id: self._sequences[id] for id in ids}
        for _ in self.events():
            pass
        return [done[id] for id in ids]

    def submit_all(self, prompts: Iterable[tuple[int, ...]], like: Request) -> list[int]:
        """`submit` each prompt with all else as in `like`, the n-th copy of one as its n-th repetition."""
        seen: Counter[tuple[int, ...]] = Counter()
        first: dict[tuple[int, ...], int] = {}
        ids = []
        for prompt in prompts:
            asked = replace(like, prompt=prompt, repetition=seen[prompt], parent=first.get(prompt))
            ids.append(self.submit(asked))
            first.setdefault(prompt, ids[-1])
            seen[prompt] += 1
        return ids

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Sequences that take part in passes; others wait."""
        return len(self._scheduler.running)

    @property
    def blocks_used(self) -> int:
        """Blocks of the cache that sequences hold."""
        return self._pool.num_blocks - self._pool.num_free

    def events(self) -> Iterator[Event]:
        """`step` until nothing is left, token by token."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass: the tokens drawn. Empty while prompts are being read, or when all is done."""
        self.ended = []
        self._leave()
        running = [one for one in self._scheduler.running if one.completion]
        drafts = self._guesses.propose(running) if self._guesses is not None and running else {}
        feeds = self._scheduler.next(self._within_length(drafts))
        if not feeds:
            return []
        asked = [self._requests[feed.sequence.id] for feed in feeds]
        told = {"routes": any(one.routes for one in asked), "experts": any(one.experts for one in asked)}
        states = self._runner.run(feeds, **told)
        events, kept = self._draw(feeds, states)
        for feed, found, count in zip(feeds, states, kept, strict=True):
            if feed.sequence.sampling.prompt_logprobs is not None and feed.start < len(feed.sequence.prompt):
                score_prompt(self._model, feed.sequence, feed.start, found.all, self._vocab_size)
            if self._requests[feed.sequence.id].experts:
                feed.sequence.remember(feed.start, {layer: ids[:count] for layer, ids in found.experts.items()})
        if self._guesses is not None:
            self._guesses.learn(self._runner, feeds, states, kept)
        for feed, count in zip(feeds, kept, strict=True):
            self._scheduler.fed(feed, count)
            if feed.sequence.finish_reason is not None:
                self._end(feed.sequence, feed.sequence.finish_reason)
        return sorted(events, key=lambda event: event.sequence.id)

    def _draw(self, feeds: list[Feed], states: list[States]) -> tuple[list[Event], list[int]]:
        """What is drawn after each feed, and how many of its tokens stay: guesses only as far as the draw agrees."""
        kept = [len(feed.tokens) - max(0, feed.wants - 1) for feed in feeds]
        firsts = list(kept)
        open_ = [number for number, feed in enumerate(feeds) if feed.wants]
        events: list[Event] = []
        if not open_:
            return events, kept
        begun, depth = len(open_), 0
        for number in open_:
            feeds[number].sequence.passes += 1
        while open_:
            ready = [feeds[number].sequence for number in open_]
            rows = torch.stack([states[number].logits[depth, : self._vocab_size] for number in open_])
            still = []
            for number, drawn in zip(open_, draw(rows, ready, self._stop_ids), strict=True):
                feed, token = feeds[number], drawn.token_id
                text = feed.sequence.append(token, drawn.logprob, self._stop_ids)
                feed.sequence.likely.append(drawn.likely)
                row = firsts[number] + depth - 1
                routes = _routes(states[number], row) if self._requests[feed.sequence.id].routes else {}
                reason = feed.sequence.finish_reason
                events.append(Event(feed.sequence, token, drawn.logprob, drawn.likely, text, routes, reason))
                guessed = feed.tokens[firsts[number] + depth] if depth + 1 < feed.wants else None
                if guessed is not None:
                    self.acceptance.count(depth, guessed == token)
                if guessed == token and feed.sequence.finish_reason is None:
                    kept[number] += 1
                    still.append(number)
            open_, depth = still, depth + 1
        self.acceptance.passed(begun, len(events))
        return events, kept

    def _within_length(self, drafts: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """No guess beyond the last token that may be drawn."""
        cut = {}
        for id, guessed in drafts.items():
            sequence = self._sequences[id]
            cut[id] = guessed[: max(0, sequence.sampling.max_new_tokens - len(sequence.completion) - 1)]
        return cut

    def _leave(self) -> None:
        """Who was stopped from outside, or is out of time."""
        now = time.monotonic()
        for sequence in list(self._sequences.values()):
            deadline = self._requests[sequence.id].deadline
            if sequence.finish_reason is not None or (deadline is not None and now >= deadline):
                self._end(sequence, "deadline")

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = sequence.finish_reason or reason
        sequence.finish_text()
        if sequence.parent is not None:
            sequence.take_experts(sequence.parent)
        self._scheduler.finish(sequence)
        if self._guesses is not None:
            self._guesses.forget(sequence)
        self.ended.append(sequence)
        del self._sequences[sequence.id], self._requests[sequence.id]

    def _text(self, request: Request) -> TextStream | None:
        sampling = request.sampling
        if self._tokenizer is not None:
            decoder = self._tokenizer.decoder(request.continues)
            return TextStream(decoder, sampling.stop, min_tokens=sampling.min_new_tokens)
        if sampling.stop:
            raise ConfigError("a request with stop strings needs an engine that knows the model's tokenizer")
        return None

    @cached_property
    def _grammars(self) -> Grammars:
        if self._tokenizer is None:
            raise ConfigError("a request with a grammar needs an engine that knows the model's tokenizer")
        return Grammars(self._tokenizer, vocab_size=self._vocab_size, end_ids=self._stop_ids)


def engine_for(
    opened: LanguageModel,
    *,
    steady: bool = False,
    guesses: Guesses | None = None,
    cache_bytes: int | None = None,
    cache_dtype: torch.dtype | None = None,
    max_sequences: int = 32,
) -> Engine:
    """An engine for a model as it was opened: it stops where the model's own tokenizer ends a text or a turn.

    The rest as in `Engine`.
    """
    tokenizer = opened.tokenizer
    return Engine(
        opened.model,
        end_of_text_id=tokenizer.end_of_text_id,
        stop_ids=tokenizer.stop_ids,
        cache_bytes=cache_bytes,
        cache_dtype=cache_dtype,
        max_sequences=max_sequences,
        steady=steady,
        guesses=guesses,
        tokenizer=tokenizer,
    )


def _routes(states: States, row: int) -> dict[int, Route]:
    """The experts of one token of a feed."""
    return {
        layer: Route(
            tuple(found.experts[row].tolist()),
            tuple(found.gates[row].tolist()),
            None if found.shared is None else float(found.shared[row]),
        )
        for layer, found in states.routes.items()
    }
