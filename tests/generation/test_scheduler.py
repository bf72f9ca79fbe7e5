"""Block pool and scheduler, driven at random against a cache that remembers what was written where."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.core.errors import DataError
from finemoe.generation.blocks import BlockPool
from finemoe.generation.config import SamplingConfig
from finemoe.generation.scheduler import Feed, Scheduler
from finemoe.generation.sequence import Sequence

NO_CHANCE = torch.Generator()


def sequence(id: int, prompt: list[int], new: int, parent: Sequence | None = None, salt: bytes = b"") -> Sequence:
    made = Sequence(id, tuple(prompt), SamplingConfig(max_new_tokens=new), NO_CHANCE)
    made.parent, made.salt = parent, salt
    return made


def following(tokens: list[int], salt: bytes) -> int:
    """What a model would say: it depends on all that was read, and under what."""
    return zlib.crc32(bytes(tokens) + salt) % 5


@dataclass
class Cache:
    """Blocks of (token, salt); a model that reads from them finds out what is wrong with a table."""

    size: int
    blocks: dict[int, dict[int, tuple[int, bytes]]] = field(default_factory=dict)

    def run(self, feed: Feed) -> list[int]:
        """The tokens that follow each of the last `wants`."""
        for source, target in feed.copies:
            self.blocks[target] = dict(self.blocks[source])
        salt = feed.sequence.salt
        for place, token in enumerate(feed.tokens, feed.start):
            self.blocks.setdefault(feed.blocks[place // self.size], {})[place % self.size] = (token, salt)
        end = feed.start + len(feed.tokens)
        read = [self.blocks[feed.blocks[place // self.size]][place % self.size] for place in range(end)]
        assert {own for _, own in read} <= {salt}
        tokens = [token for token, _ in read]
        return [following(tokens[: end - feed.wants + 1 + n], salt) for n in range(feed.wants)]


@dataclass
class Drive:
    """Scheduler, pool and cache under one roof, checked after every pass."""

    pool: BlockPool
    scheduler: Scheduler
    max_tokens: int
    max_sequences: int
    chance: random.Random
    cache: Cache = field(init=False)
    done: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = Cache(self.pool.size)

    def step(self) -> bool:
        drafts = {}
        for one in self.scheduler.running:
            if one.completion and self.chance.random() < 0.5:
                text, guessed = one.tokens, list[int]()
                for _ in range(self.chance.randrange(4)):
                    right = following(text + guessed, one.salt)
                    guessed.append(right if self.chance.random() < 0.7 else (right + 1) % 5)
                room = one.sampling.max_new_tokens - len(one.completion) - 1
                drafts[one.id] = guessed[: max(0, room)]
        feeds = self.scheduler.next(drafts)
        assert sum(len(feed.tokens) for feed in feeds) <= self.max_tokens
        assert len(self.scheduler.running) <= self.max_sequences
        assert len({feed.sequence.id for feed in feeds}) == len(feeds)
        drawn = [self.cache.run(feed) for feed in feeds]
        for feed, tokens in zip(feeds, drawn, strict=True):
            self._take(feed, tokens)
        self.check()
        return bool(feeds)

    def _take(self, feed: Feed, tokens: list[int]) -> None:
        one = feed.sequence
        guessed = feed.tokens[len(feed.tokens) - feed.wants + 1 :] if feed.wants else ()
        kept = len(feed.tokens) - len(guessed)
        for number, token in enumerate(tokens):
            one.append(token, 0.0, frozenset())
            if one.finish_reason is not None or number == len(guessed) or guessed[number] != token:
                break
            kept += 1
        self.scheduler.fed(feed, kept)
        if one.finish_reason is not None:
            self.scheduler.finish(one)
            self.done.append(one)

    def check(self) -> None:
        held = [block for one in self.scheduler.running for block in one.blocks]
        assert all(self.pool._owners[block] == held.count(block) for block in range(self.pool.num_blocks))
        assert self.pool.num_free == self.pool.num_blocks - len(set(held))
        for one in self.scheduler.running:
            assert len(one.blocks) * self.pool.size >= one.num_cached
        assert not any(one.blocks for one in self.scheduler.waiting)


def expected(one: Sequence) -> list[int]:
    tokens = list(one.prompt)
    for _ in range(one.sampling.max_new_tokens):
        tokens.append(following(tokens, one.salt))
    return tokens[len(one.prompt) :]


def drive(seed: int, requests: int, size: int, blocks: int, tokens: int, most: int, chunk: int, reuse: bool) -> Drive:
    pool, chance = BlockPool(blocks, size, reuse=reuse), random.Random(seed)
    scheduler = Scheduler(pool, max_sequences=most, max_tokens=tokens, chunk=chunk)
    driven = Drive(pool, scheduler, tokens, most, chance)
    begin = [chance.randrange(5) for _ in range(3 * size)]
    wanted: list[Sequence] = []
    cancelled: set[int] = set()
    passes, work = 0, 0
    while len(wanted) < requests or scheduler.waiting or scheduler.running:
        while len(wanted) < requests and chance.random() < 0.6:
            room = blocks * size
            prompt = begin[: chance.randrange(len(begin))] + [
                chance.randrange(5) for _ in range(chance.randrange(1, 9))
            ]
            prompt = prompt[: max(1, room - 6)]
            new = chance.randrange(1, min(7, room - len(prompt) + 1) + 1)
            parent = None
            for _ in range(chance.choice([1, 1, 1, 3])):
                one = sequence(len(wanted), prompt, new, parent, chance.choice([b"", b"", b"other"]))
                if parent is not None:
                    one.salt = parent.salt
                parent = parent or one
                wanted.append(one)
                scheduler.add(one)
                work += len(prompt) + new
        if wanted and chance.random() < 0.05:
            number = chance.randrange(len(wanted))
            if scheduler.cancel(number):
                cancelled.add(number)
                assert not wanted[number].blocks
        moved = driven.step()
        passes += 1
        assert moved or not (scheduler.waiting or scheduler.running)
        assert passes < 50 + 20 * work
    assert {one.id for one in driven.done} | cancelled == {one.id for one in wanted}
    for one in driven.done:
        assert one.completion == expected(one)
    assert pool.num_free == blocks
    return driven


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 4, 7]),
    blocks=st.integers(2, 24),
    tokens=st.integers(1, 40),
    most=st.integers(1, 8),
    chunk=st.integers(1, 20),
    reuse=st.booleans(),
)
def test_whatever_is_asked_everybody_gets_what_is_theirs_and_no_block_is_lost(
    seed: int, size: int, blocks: int, tokens: int, most: int, chunk: int, reuse: bool
) -> None:
    drive(seed, 12, size, max(blocks, -(-8 // size)), tokens, most, chunk, reuse)


def test_ten_thousand_requests_leak_nothing_and_are_put_back_on_the_way() -> None:
    driven = drive(1, 10_000, 4, 8, 48, 12, 16, True)
    assert driven.scheduler.num_preempted > 20


def test_a_prefix_is_read_once() -> None:
    pool = BlockPool(32, 4)
    scheduler = Scheduler(pool, max_tokens=64, chunk=64)
    cache, begin = Cache(4), list(range(3)) * 7
    first, second, other = (sequence(n, [*begin, 3 + n], 1, salt=salt) for n, salt in enumerate([b"", b"", b"x"]))
    lengths = []
    for one in (first, second, other):
        scheduler.add(one)
        (feed,) = scheduler.next()
        cache.run(feed)
        lengths.append(len(feed.tokens))
        scheduler.fed(feed, len(feed.tokens))
        scheduler.finish(one)
    assert lengths == [22, 2, 22]


def test_samples_of_one_prompt_share_its_blocks_until_they_part() -> None:
    pool = BlockPool(8, 4)
    driven = Drive(pool, Scheduler(pool, max_tokens=64), 64, 32, random.Random(0))
    one = sequence(0, [1, 2, 3, 4, 1, 2], 6)
    others = [sequence(n, [1, 2, 3, 4, 1, 2], 6, one) for n in (1, 2)]
    for each in (one, *others):
        driven.scheduler.add(each)
    driven.step()
    assert [len(each.blocks) for each in (one, *others)] == [2, 0, 0]
    driven.step()
    assert len({each.blocks[0] for each in (one, *others)}) == 1
    assert len({each.blocks[1] for each in (one, *others)}) == 3


def test_a_short_prompt_is_read_beside_a_long_one_and_decoding_goes_on() -> None:
    pool = BlockPool(100, 4)
    scheduler = Scheduler(pool, max_tokens=32, chunk=16)
    long, short = sequence(0, [1] * 200, 4), sequence(1, [2] * 5, 40)
    scheduler.add(long)
    scheduler.add(short)
    feeds = scheduler.next()
    assert [(feed.sequence.id, len(feed.tokens), feed.wants) for feed in feeds] == [(0, 16, 0), (1, 5, 1)]
    for feed in feeds:
        scheduler.fed(feed, len(feed.tokens))
    short.append(3, 0.0, frozenset())
    feeds = scheduler.next()
    assert [(feed.sequence.id, len(feed.tokens), feed.wants) for feed in feeds] == [(1, 1, 1), (0, 16, 0)]


def test_what_never_fits_is_refused_at_once() -> None:
    scheduler = Scheduler(BlockPool(4, 8))
    with pytest.raises(DataError, match=r"30 tokens and 4 new ones need room for 33 .* 4 blocks of 8, 32 in all"):
        scheduler.add(sequence(0, [1] * 30, 4))
    scheduler.add(sequence(1, [1] * 29, 4))


def test_the_last_token_is_never_found() -> None:
    pool, text = BlockPool(4, 4), list(range(8))
    blocks = pool.allocate(2) or []
    pool.seal(blocks, text)
    pool.release(blocks)
    assert pool.match(text) == blocks[:1]
    assert pool.match([*text, 9]) == blocks
    assert pool.match(text, b"another") == []
