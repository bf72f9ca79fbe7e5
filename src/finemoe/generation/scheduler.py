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

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int = 32,
        max_tokens: int = 512,
        chunk: int = 256,
        put_back: bool = True,
    ) -> None:
        """An empty one.

        Args:
            pool: where blocks come from.
            max_sequences: most that run at once.
            max_tokens: most tokens of one pass.
            chunk: most tokens of one prompt in a pass while there are others.
            put_back: False: a sequence waits until there is room for all that it may become, and is read but once.
        """
        if min(max_sequences, max_tokens, chunk) < 1:
            raise ValueError("max_sequences, max_tokens and chunk are at least 1")
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._chunk = chunk
        self._may_put_back = put_back
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
        feeds += self._reading(self._max_tokens - sum(len(feed.tokens) for feed in feeds))
        while not feeds and self.running:  # prompts that hold all blocks between them: the newest gives way
            alone = len(self.running) == 1
            feeds = self._reading(self._max_tokens)
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
        if whole > feed.start // self._pool.size:
            known = [*sequence.prompt, *sequence.completion][: whole * self._pool.size]
            self._pool.seal(sequence.blocks[:whole], known, sequence.salt)

    def _decoding(self, drafts: Mapping[int, Items[int]]) -> list[Feed]:
        feeds: list[Feed] = []
        decoding = [sequence for sequence in self.running if _decodes(sequence)][: self._max_tokens]
        spare = self._max_tokens - len(decoding)  # a guess takes nobody's own token
        for sequence in decoding:
            if sequence not in self.running:
                continue
            guessed = list(drafts.get(sequence.id, ()))[:spare]
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
            spare -= len(feed.tokens) - 1
        return feeds

    def _reading(self, budget: int) -> list[Feed]:
        """Pieces of prompts. Where a pass has no room for all, the oldest and those that wait are first by turns."""
        reading = [sequence for sequence in self.running if not _decodes(sequence)]
        self._turn += 1
        feeds: list[Feed] = []
        if self._turn % 2 == 0:
            self._begin(budget, feeds)
            by = self._turn // 2 % len(reading) if reading else 0
            reading = [*reading[by:], *reading[:by]]
        for sequence in reading:
            self._read(sequence, budget - _width(feeds), feeds)
        if self._turn % 2:
            self._begin(budget - _width(feeds), feeds)
        return feeds

    def _begin(self, budget: int, feeds: list[Feed]) -> None:
        """Append the first pieces of those that wait to `feeds`, first come, first served."""
        most = budget + _width(feeds)
        for sequence in list(self.waiting):
            if _width(feeds) >= most or len(self.running) == self._max_sequences:
                break
            if self._waits_for_another(sequence):
                continue
            if not self._admit(sequence):
                break  # nobody overtakes who waits for room
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._read(sequence, most - _width(feeds), feeds)

    def _waits_for_another(self, sequence: Sequence) -> bool:
        """Whether another is about to read what can then be shared or found."""
        parent = sequence.parent
        if parent is not None and not sequence.completion and parent.finish_reason is None:
            unread = parent in self.running and parent.num_cached < len(parent.prompt)
            if unread or parent in self.waiting:
                return True
        return self._pool.reuse and any(self._reads_for(one, sequence) for one in self.running)

    def _reads_for(self, one: Sequence, other: Sequence) -> bool:
        """Whether the block that `one` reads next is a block that `other` would read too, after all the same."""
        end = (one.num_cached // self._pool.size + 1) * self._pool.size
        if one.salt != other.salt or not end < min(len(one.prompt) + 1, len(other.prompt)):
            return False
        start = end - self._pool.size  # most that differ do so in this very block
        return one.prompt[start:end] == other.prompt[start:end] and one.prompt[:start] == other.prompt[:start]

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
        # Room for its text beside what the others have yet to read, and a block for each, so that nobody is put back
        # at once and nothing is read in vain.
        needed = sum(self._unread(one) for one in [sequence, *self.running])
        if self.running and self._pool.num_free < needed + 1 + len(self.running):
            self._free(sequence)
            return False
        return True

    def _unread(self, sequence: Sequence) -> int:
        """Blocks that it takes to read the rest of a text, or all that may follow where nobody is put back."""
        further = len(sequence.completion) if self._may_put_back else sequence.sampling.max_new_tokens - 1
        return max(0, -(-(len(sequence.prompt) + further) // self._pool.size) - len(sequence.blocks))

    def _read(self, sequence: Sequence, budget: int, feeds: list[Feed]) -> None:
        """Append the next piece of a prompt to `feeds`, where there is room for one."""
        left = sequence.tokens[sequence.num_cached :]
        alone = len(self.running) + len(self.waiting) == 1
        most = min(len(left), budget, budget if alone else self._chunk)
        have = len(sequence.blocks) * self._pool.size - sequence.num_cached
        most = min(most, have + self._pool.num_free * self._pool.size)
        feed = self._feed(sequence, left[:most], int(most == len(left))) if most > 0 else None
        if feed is not None:
            feeds.append(feed)

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


def _width(feeds: Items[Feed]) -> int:
    return sum(len(feed.tokens) for feed in feeds)


def _decodes(sequence: Sequence) -> bool:
    """All but the last token that was drawn is in the cache."""
    return bool(sequence.completion) and sequence.num_cached == len(sequence.prompt) + len(sequence.completion) - 1
