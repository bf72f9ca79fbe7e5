"""Guesses of the tokens that come next, from a text itself, a small model, or the model's own prediction module.

A guess is fed along with the token before it, and kept where the draw from the model comes out the same: so a text is
the one that would have been drawn without guesses, token by token, and only passes are fewer. Speculative sampling
(Leviathan et al., 2023) agrees as often where guesses are made without chance, as here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.errors import ConfigError
from finemoe.core.logs import logger
from finemoe.generation.blocks import BlockPool
from finemoe.generation.runner import BLOCK_SIZE, Ahead, Runner, States, blocks_for
from finemoe.generation.scheduler import Feed
from finemoe.generation.sequence import Constraint, Sequence
from finemoe.model.transformer import Transformer

_ENOUGH = 200  # guesses before somebody is told that they are worth nothing
_WORTHLESS = 0.02


@dataclass
class Acceptance:
    """How guesses fared."""

    guessed: list[int] = field(default_factory=list)
    """By how far ahead: guesses that were looked at."""
    right: list[int] = field(default_factory=list)
    """Those that were drawn."""
    passes: int = 0
    """Times that a sequence went through the model and something was drawn for it."""
    tokens: int = 0
    """Tokens drawn."""

    def count(self, depth: int, right: bool) -> None:
        """A guess `depth` + 1 tokens ahead."""
        while len(self.guessed) <= depth:
            self.guessed.append(0)
            self.right.append(0)
        self.guessed[depth] += 1
        self.right[depth] += right

    def passed(self, sequences: int, tokens: int) -> None:
        """A pass in which tokens were drawn for so many sequences."""
        self.passes += sequences
        self.tokens += tokens

    @property
    def rates(self) -> list[float]:
        """By how far ahead: the share of guesses that were right, of those that were looked at."""
        return [right / guessed for right, guessed in zip(self.right, self.guessed, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """1 without guesses."""
        return self.tokens / self.passes if self.passes else 0.0

    def __str__(self) -> str:
        if not self.guessed:
            return f"nothing was guessed, {self.tokens_per_pass:.2f} tokens a pass"
        shares = ", ".join(f"{rate:.0%}" for rate in self.rates)
        ahead = " (one, two ... tokens ahead)" if len(self.rates) > 1 else ""
        return f"guesses right: {shares}{ahead}, {self.tokens_per_pass:.2f} tokens a pass"


class Guesses(Protocol):
    """Where guesses come from."""

    def propose(self, sequences: Items[Sequence]) -> dict[int, list[int]]:
        """Tokens that may follow each of these, by their numbers; none for some of them is well."""

    def learn(self, runner: Runner, feeds: Items[Feed], states: Items[States], kept: Items[int]) -> None:
        """A pass was made, and the first `kept` tokens of each feed stay; what was drawn is part of the sequences."""

    def forget(self, sequence: Sequence) -> None:
        """It is done."""


class LookUp:
    """An index of one growing text: what followed its last few tokens the last time (prompt lookup, Saxena 2023)."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """Suffixes of `longest` down to `shortest` tokens are looked for, the longest first."""
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Items[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which only ever grows from call to call."""
        self._extend(tokens)
        for length in self._lengths:
            if len(tokens) > length:
                found = self._after.get(tuple(tokens[-length:]))
                if found is not None:
                    return list(tokens[found : found + most])
        return []

    def _extend(self, tokens: Items[int]) -> None:
        """Index what is new; a run of tokens that the text ends on has nothing behind it yet."""
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._after[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)


@final
class FromText:
    """What came next the last time, in the same text."""

    def __init__(self, most: int = 4) -> None:
        """`most` tokens at a time."""
        self._most = most
        self._known: dict[int, LookUp] = {}

    def propose(self, sequences: Items[Sequence]) -> dict[int, list[int]]:
        """As `Guesses`."""
        return {one.id: self._known.setdefault(one.id, LookUp()).guess(one.tokens, self._most) for one in sequences}

    def learn(self, runner: Runner, feeds: Items[Feed], states: Items[States], kept: Items[int]) -> None:
        """Nothing: the texts say it all."""

    def forget(self, sequence: Sequence) -> None:
        """As `Guesses`."""
        self._known.pop(sequence.id, None)


@final
class FromModule:
    """What the model's own multi-token prediction module says (V3 section 2.2), run again to look further ahead."""

    def __init__(self, model: Transformer, most: int = 1, vocab_size: int | None = None) -> None:
        """`most` tokens at a time; ids from `vocab_size` on are never guessed.

        Raises:
            ConfigError: the model has no such module.
        """
        if not model.mtp:
            raise ConfigError(
                "this model has no multi-token prediction module to guess with: it was trained without one (mtp_depth) "
                "or written without it; take a smaller model, or look-up in the text"
            )
        self._model, self._most, self._vocab = model, most, vocab_size or model.config.vocab_size
        self._next: dict[int, list[int]] = {}
        self._counted = [0, 0]

    def propose(self, sequences: Items[Sequence]) -> dict[int, list[int]]:
        """As `Guesses`."""
        return {one.id: list(self._next.get(one.id, ())) for one in sequences}

    def learn(self, runner: Runner, feeds: Items[Feed], states: Items[States], kept: Items[int]) -> None:
        """As `Guesses`: the module reads what the model has read, and its last states say what may come."""
        parts, owners = [], []
        for feed, found, count in zip(feeds, states, kept, strict=True):
            end = feed.start + count
            following = feed.sequence.tokens[feed.start + 1 : end + 1]
            if len(following) == count and count:
                parts.append(Ahead(feed.blocks, feed.start, found.all[:count], following))
                owners.append(feed)
            self._watch(feed)
        if not parts:
            return
        ends = [part.start + len(part.following) for part in parts]
        found_ahead = runner.ahead(parts)
        for feed in owners:
            self._next[feed.sequence.id] = []
        decoding = [n for n, feed in enumerate(owners) if feed.wants]
        outputs = {n: (found_ahead[n][0][-1:], found_ahead[n][1][-1:]) for n in decoding}
        size = runner.block_size
        for depth in range(self._most):
            if not decoding:
                return
            guessed = self._best(torch.cat([outputs[n][1] for n in decoding]))
            for n, token in zip(decoding, guessed, strict=True):
                self._next[owners[n].sequence.id].append(token)
            place = {n: ends[n] + depth for n in decoding}
            decoding = [n for n in decoding if place[n] < len(owners[n].blocks) * size and depth + 1 < self._most]
            further = [
                Ahead(owners[n].blocks, place[n], outputs[n][0], self._next[owners[n].sequence.id][-1:])
                for n in decoding
            ]
            outputs = dict(zip(decoding, runner.ahead(further), strict=True)) if further else {}

    def forget(self, sequence: Sequence) -> None:
        """As `Guesses`."""
        self._next.pop(sequence.id, None)

    def _best(self, states: Tensor) -> list[int]:
        best: list[int] = self._model.logits(states)[:, : self._vocab].argmax(dim=-1).tolist()
        return best

    def _watch(self, feed: Feed) -> None:
        """Say so, once, when the module guesses as if it had never been trained."""
        if feed.wants < 2 or self._counted[0] > _ENOUGH:
            return
        text, place = feed.sequence.tokens, feed.start + len(feed.tokens) - feed.wants + 1
        self._counted[0] += 1
        self._counted[1] += place < len(text) and text[place] == feed.tokens[len(feed.tokens) - feed.wants + 1]
        if self._counted[0] == _ENOUGH and self._counted[1] < _WORTHLESS * _ENOUGH:
            logger.warning(
                "the model's prediction module was right %d times in %d: its weights may be missing or never trained, "
                "and guessing with it only costs time",
                self._counted[1], _ENOUGH,
            )  # fmt: skip


@final
class Chosen:
    """Several sources, of which each request names its own (`Request.guess`), or none."""

    def __init__(self, sources: Mapping[str, Guesses]) -> None:
        """By name."""
        self._sources = dict(sources)

    def propose(self, sequences: Items[Sequence]) -> dict[int, list[int]]:
        """As `Guesses`."""
        guessed: dict[int, list[int]] = {}
        for name, source in self._sources.items():
            own = [one for one in sequences if one.guess == name]
            if own:
                guessed |= source.propose(own)
        return guessed

    def learn(self, runner: Runner, feeds: Items[Feed], states: Items[States], kept: Items[int]) -> None:
        """As `Guesses`."""
        for name, source in self._sources.items():
            own = [number for number, feed in enumerate(feeds) if feed.sequence.guess == name]
            if own:
                source.learn(runner, [feeds[n] for n in own], [states[n] for n in own], [kept[n] for n in own])

    def forget(self, sequence: Sequence) -> None:
        """As `Guesses`."""
        if sequence.guess in self._sources:
            self._sources[sequence.guess].forget(sequence)


@dataclass
class _Draft:
    """What a small model has read of a sequence."""

    blocks: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """A feed of the small model."""

    blocks: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]
    wants: int = 1
    copies: tuple[tuple[int, int], ...] = ()
    constraint: Constraint | None = None


@final
class FromModel:
    """What a smaller model of the same tokenizer would say, with a cache of its own."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        most: int = 4,
        block_size: int = BLOCK_SIZE,
        vocab_size: int | None = None,
    ) -> None:
        """`most` tokens at a time, ids from `vocab_size` on never; a text for which there is no room is not guessed."""
        self._vocab = vocab_size or model.config.vocab_size
        self._runner = Runner(model, num_blocks, block_size)
        self._pool = BlockPool(num_blocks, block_size, reuse=False)
        self._most = most
        self._known: dict[int, _Draft] = {}

    def propose(self, sequences: Items[Sequence]) -> dict[int, list[int]]:
        """As `Guesses`."""
        guessed: dict[int, list[int]] = {}
        for one in sequences:
            own, tokens = self._known.setdefault(one.id, _Draft()), one.tokens
            same = next((n for n, (a, b) in enumerate(zip(own.read, tokens, strict=False)) if a != b), None)
            own.read = own.read[: min(len(own.read) if same is None else same, len(tokens) - 1)]
            missing = -(-(len(tokens) + self._most) // self._pool.size) - len(own.blocks)
            fresh = self._pool.allocate(max(0, missing))
            if fresh is not None:
                own.blocks += fresh
                guessed[one.id] = []
        texts = {one.id: one.tokens for one in sequences if one.id in guessed}
        for _ in range(self._most if texts else 0):
            pieces = []
            for id, text in texts.items():
                own, whole = self._known[id], [*text, *guessed[id]]
                pieces.append(_Piece(tuple(own.blocks), len(own.read), tuple(whole[len(own.read) :])))
                own.read = whole
            logits = torch.cat([state.logits for state in self._runner.run(pieces)])
            best = logits[:, : self._vocab].argmax(dim=-1).tolist()
            for id, token in zip(texts, best, strict=True):
                guessed[id].append(token)
        return guessed

    def learn(self, runner: Runner, feeds: Items[Feed], states: Items[States], kept: Items[int]) -> None:
        """Nothing: it reads the texts when it is asked."""

    def forget(self, sequence: Sequence) -> None:
        """As `Guesses`."""
        self._pool.release(self._known.pop(sequence.id, _Draft()).blocks)


def guesses_from(source: str | os.PathLike[str], opened: LanguageModel, most: int | None = None) -> Guesses:
    """Guesses for `opened` by the name of where they come from.

    Args:
        source: `text`, `module`, or the path of a smaller model with the same tokenizer.
        opened: whose tokens are guessed.
        most: tokens at a time; None: 2 of the module, which then runs twice, and 4 of the others.

    Raises:
        ConfigError: no module, or a model that spells its tokens in another way.
        FinemoeError: nothing that can be opened.
    """
    if source == "text":
        return FromText(most or 4)
    if source == "module":
        return FromModule(opened.model, most or 2, opened.tokenizer.vocab_size)
    small = open_language_model(source)
    theirs, ours = small.tokenizer.token_bytes, opened.tokenizer.token_bytes
    other = next((i for i in sorted(theirs.keys() & ours.keys()) if theirs[i] != ours[i]), None)
    if other is not None or not theirs.keys() & ours.keys():
        detail = "" if other is None else f": token {other} is {theirs[other]!r} there and {ours[other]!r} here"
        raise ConfigError(f"{source} cannot guess for {opened.source}: their tokenizers differ{detail}")
    known = min(small.tokenizer.vocab_size, opened.tokenizer.vocab_size)
    return FromModel(small.model, blocks_for(small.model, BLOCK_SIZE, None, None), most or 4, vocab_size=known)
