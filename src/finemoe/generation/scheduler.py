"""Scheduler: which sequence feeds which tokens in the next pass, and in which blocks their states lie.

Sequences that decode go first, a token each and what was guessed to follow it; what is left of the pass goes to
prompts, in pieces, so that a long one holds nobody up. Who finds no block any more is put back and read again later;
nothing is lost. There is no clock and no chance in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

from finemoe.core.errors import DataError
from finemoe.generation.blocks import BlockPool
from finemoe.generation.sequence import Constraint, Sequence


@dataclass(frozen=True)
class Feed:
    """Tokens of a sequence that go through the model in one pass."""

    sequence: Sequence
    start: int
    """Position of the first."""
    tokens: tuple[int, ...]
    wants: int
    """What follows is wanted of the last so many: 0 while there is more to read, then 1 and one more for each guess."""
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy before the pass, from and to."""
    blocks: tuple[int, ...]
    """The sequence's table."""

    @property
    def constraint(self) -> Constraint | None:
        """What holds for the sequence's experts."""
        return self.sequence.constraint


class Scheduler:
    """Sequences that wait and sequences that run, the oldest first."""

    def __init__(self, pool: BlockPool, *, max_sequences: int = 32, max_tokens: int = 512, chunk: int = 256) -> None:
        """An empty one.

        Args:
            pool: where blocks come from.
            max_sequences: most that run at once.
            max_tokens: most tokens of one pass.
            chunk: most tokens of one prompt in a pass in which others take part.
        """
        if min(max_sequences, max_tokens, chunk) < 1:
            raise ValueError("max_sequences, max_tokens and chunk are at least 1")
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._chunk = chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._turn = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a fresh sequence.

        Raises:
            DataError: it could never fit, even alone.
        """
        longest = len(sequence.prompt) + sequence.sampling.max_new_tokens - 1
        room = self._pool.num_blocks * self._pool.size
        if longest > room:
            raise DataError(
                f"a prompt of {len(sequence.prompt)} tokens and {sequence.sampling.max_new_tokens} new ones need room "
                f"for {longest} tokens, and the cache has {self._pool.num_blocks} blocks of {self._pool.size}, {room} "
                "in all: give it more memory, or ask for less"
            )
        self.waiting.append(sequence)

    def cancel(self, id: int) -> bool:
        """Forget a sequence and free its blocks; False where there is none of that number."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.id == id:
                self.finish(sequence)
                return True
        return False

    def finish(self, sequence: Sequence) -> None:
        """A sequence is done."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def next(self, drafts: Mapping[int, Items[int]] | None = None) -> list[Feed]:
        """What goes through the model next; empty where nothing waits or runs.

        Args:
            drafts: tokens that may follow the last one, by the number of the sequence; they may be cut.
        """
        feeds = self._decoding(drafts or {})
        feeds += self._reading(self._max_tokens - sum(len(feed.tokens) for feed in feeds), bool(feeds))
        while not feeds and self.running:  # prompts that hold all blocks between them: the newest gives way
            alone = len(self.running) == 1
            feeds = self._reading(self._max_tokens, False)
            if not feeds and not alone:
                self._put_back(self.running[-1])
            elif not feeds:
                raise RuntimeError("a sequence that fits the cache found no room in it")
        return feeds

    def fed(self, feed: Feed, kept: int) -> None:
        """After the pass: the first `kept` of the feed's tokens stay in the cache; guesses that were refused do not."""
        sequence = feed.sequence
        if sequence not in self.running:
            return
        sequence.num_cached = feed.start + kept
        whole = sequence.num_cached // self._pool.size
        if whole:
            known = [*sequence.prompt, *sequence.completion][: whole * self._pool.size]
            self._pool.seal(sequence.blocks[:whole], known, sequence.salt)

    def _decoding(self, drafts: Mapping[int, Items[int]]) -> list[Feed]:
        feeds: list[Feed] = []
        budget = self._max_tokens
        for sequence in list(self.running):
            if sequence not in self.running or not _decodes(sequence) or not budget:
                continue
            guessed = list(drafts.get(sequence.id, ()))[: max(0, budget - 1)]
            last = sequence.completion[-1]
            feed = self._feed(sequence, [last, *guessed], 1 + len(guessed))
            feed = feed or self._feed(sequence, [last], 1)
            while feed is None and self.running[-1] is not sequence:
                self._put_back(self.running[-1])
                feed = self._feed(sequence, [last], 1)
            if feed is None:
                if len(self.running) == 1:
                    raise RuntimeError("a sequence that fits the cache found no room in it")
                self._put_back(sequence)
                continue
            feeds.append(feed)
            budget -= len(feed.tokens)
        return feeds

    def _reading(self, budget: int, beside: bool) -> list[Feed]:
        """Pieces of prompts: the oldest first, then the others in turn, then those that wait."""
        feeds: list[Feed] = []
        reading = [sequence for sequence in self.running if not _decodes(sequence)]
        if len(reading) > 1:
            self._turn += 1
            by = self._turn % (len(reading) - 1)
            reading = [reading[0], *reading[1 + by :], *reading[1 : 1 + by]]
        shared = beside or len(reading) > 1 or bool(self.waiting)
        for sequence in reading:
            budget -= self._read(sequence, budget, shared, feeds)
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) == self._max_sequences:
                break
            if self._waits_for_its_parent(sequence):
                continue
            if not self._admit(sequence):
                break  # nobody overtakes who waits for room
            self.waiting.remove(sequence)
            self.running.append(sequence)
            budget -= self._read(sequence, budget, beside or bool(feeds) or len(self.waiting) > 0, feeds)
        return feeds

    def _waits_for_its_parent(self, sequence: Sequence) -> bool:
        parent = sequence.parent
        if parent is None or sequence.completion or parent.finish_reason is not None:
            return False
        return parent in self.waiting or (parent in self.running and parent.num_cached < len(parent.prompt))

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence that waits what is known of its text; whether there is room for it to begin."""
        parent, prompt = sequence.parent, len(sequence.prompt)
        if parent is not None and parent in self.running and not sequence.completion:
            sequence.blocks = parent.blocks[: -(-prompt // self._pool.size)]
            self._pool.share(sequence.blocks)
            sequence.num_cached = prompt - 1
        else:
            sequence.blocks = self._pool.match(sequence.tokens, sequence.salt)
            sequence.num_cached = len(sequence.blocks) * self._pool.size
        # Room for the first piece, and a block for each that runs, so that it is not put back at once.
        piece = min(len(sequence.tokens) - sequence.num_cached, self._chunk)
        if self.running and self._pool.num_free < -(-piece // self._pool.size) + 1 + len(self.running):
            self._free(sequence)
            return False
        return True

    def _read(self, sequence: Sequence, budget: int, shared: bool, feeds: list[Feed]) -> int:
        """Append the next piece of a prompt to `feeds`; how many tokens it has."""
        left = sequence.tokens[sequence.num_cached :]
        most = min(len(left), budget, self._chunk if shared else budget)
        have = len(sequence.blocks) * self._pool.size - sequence.num_cached
        most = min(most, have + self._pool.num_free * self._pool.size)
        if most < 1:
            return 0
        feed = self._feed(sequence, left[:most], int(most == len(left)))
        if feed is None:
            return 0
        feeds.append(feed)
        return most

    def _feed(self, sequence: Sequence, tokens: list[int], wants: int) -> Feed | None:
        """The feed, once there are blocks for it and they are the sequence's own; None where there are not enough."""
        size, start = self._pool.size, sequence.num_cached
        last = -(-(start + len(tokens)) // size)
        table = sequence.blocks
        shared = [n for n in range(start // size, min(last, len(table))) if not self._pool.is_writable(table[n])]
        missing = max(0, last - len(table))
        fresh = self._pool.allocate(missing + len(shared))
        if fresh is None:
            return None
        copies = tuple((table[number], fresh[place]) for place, number in enumerate(shared))
        for number, (source, target) in zip(shared, copies, strict=True):
            table[number] = target
            self._pool.release([source])
        table += fresh[len(shared) :]
        return Feed(sequence, start, tuple(tokens), wants, copies, tuple(table))

    def _put_back(self, sequence: Sequence) -> None:
        """Its blocks go to others; it comes back first, and reads all that it had again."""
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.num_cached = [], 0


def _decodes(sequence: Sequence) -> bool:
    """All but the last token that was drawn is in the cache."""
    return bool(sequence.completion) and sequence.num_cached == len(sequence.prompt) + len(sequence.completion) - 1
