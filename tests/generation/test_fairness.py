"""Scheduler: who gets how much of a pass, who gives way, and that nothing is read twice without need."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.generation.blocks import BlockPool
from finemoe.generation.config import SamplingConfig
from finemoe.generation.scheduler import Feed, Scheduler
from finemoe.generation.sequence import Sequence

NO_CHANCE = torch.Generator()


def sequence(id: int, prompt: list[int], new: int) -> Sequence:
    return Sequence(id, tuple(prompt), SamplingConfig(max_new_tokens=new), NO_CHANCE)


@dataclass
class Course:
    """A scheduler run to its end, with a model that always says 7."""

    scheduler: Scheduler
    fed: int = 0
    passes: int = 0
    first: dict[int, int] = field(default_factory=dict)
    """In which pass each sequence got its first token."""

    def step(self, guesses: int = 0) -> list[Feed]:
        """One pass; of so many guesses none is right."""
        feeds = self.scheduler.next({one.id: [8] * guesses for one in self.scheduler.running})
        self.passes += 1
        for feed in feeds:
            one = feed.sequence
            self.fed += len(feed.tokens)
            if feed.wants:
                one.append(7, 0.0, frozenset())
                self.first.setdefault(one.id, self.passes)
            self.scheduler.fed(feed, len(feed.tokens) - max(0, feed.wants - 1))
            if one.finish_reason is not None:
                self.scheduler.finish(one)
        return feeds

    def run(self) -> None:
        while self.scheduler.waiting or self.scheduler.running:
            assert self.step()


@pytest.mark.parametrize("longs", [1, 2, 3, 8])
@pytest.mark.parametrize(("tokens", "chunk"), [(512, 256), (256, 256), (64, 512)])
def test_a_short_prompt_is_not_kept_waiting_by_many_long_ones(longs: int, tokens: int, chunk: int) -> None:
    course = Course(Scheduler(BlockPool(20_000, 16), max_tokens=tokens, chunk=chunk))
    for number in range(longs):
        course.scheduler.add(sequence(number, [number] * 8192, 2))
    course.scheduler.add(sequence(99, [99] * 20, 2))
    course.run()
    assert course.first[99] <= 4 + 2 * longs  # a long one alone takes 16 passes of 512 tokens
    assert course.first[0] <= 2 * 8192 // min(tokens, chunk) + 2  # and the oldest gets every second pass at least


@given(tokens=st.integers(1, 40), guesses=st.integers(0, 9), many=st.integers(1, 9))
def test_a_guess_takes_nobodys_own_token(tokens: int, guesses: int, many: int) -> None:
    course = Course(Scheduler(BlockPool(200, 4), max_tokens=tokens))
    for number in range(many):
        course.scheduler.add(sequence(number, [number], 12))
    while course.scheduler.waiting or course.scheduler.running:
        ready = [one.id for one in course.scheduler.running if one.num_cached + 1 == len(one.tokens) > 1]
        feeds = course.step(guesses)
        served = {feed.sequence.id for feed in feeds}
        assert served >= set(ready[:tokens])
        assert sum(len(feed.tokens) for feed in feeds) <= tokens


def test_prompts_that_do_not_fit_together_are_not_read_in_vain() -> None:
    course = Course(Scheduler(BlockPool(100, 16, reuse=False)))
    for number in range(8):
        course.scheduler.add(sequence(number, [number] * 1200, 16))
    course.run()
    assert course.fed == 8 * (1200 + 15)
    assert course.scheduler.num_preempted == 0


@pytest.mark.parametrize("tail", [1, 20, 300])
def test_a_beginning_that_all_share_is_read_once_even_when_all_come_at_once(tail: int) -> None:
    course = Course(Scheduler(BlockPool(2000, 16)))
    for number in range(20):
        course.scheduler.add(sequence(number, [*range(512), *[1000 + number] * tail], 1))
    course.run()
    assert course.fed == 512 + 20 * tail


def test_who_found_no_room_comes_back_before_all_who_wait_and_the_newest_went_first() -> None:
    course = Course(Scheduler(BlockPool(9, 4, reuse=False)))
    everybody = [sequence(number, [number] * 4, 17) for number in range(6)]
    for one in everybody:
        course.scheduler.add(one)
    put_back = 0
    while course.scheduler.waiting or course.scheduler.running:
        oldest, before = course.scheduler.running[:1], list(course.scheduler.running)
        feeds = course.step()
        gone = [one for one in before if one not in course.scheduler.running and one.finish_reason is None]
        assert not gone or gone == before[-len(gone) :]
        assert all(one in {feed.sequence for feed in feeds} for one in oldest)
        assert gone == list(course.scheduler.waiting)[: len(gone)]
        put_back += len(gone)
    assert put_back == course.scheduler.num_preempted > 0
    assert all(len(one.completion) == 17 for one in everybody)


@given(seed=st.integers(0, 10**6))
def test_whatever_comes_the_oldest_goes_on_and_nobody_waits_for_ever(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([1, 4, 16])
    blocks = -(-60 // size) + chance.randrange(6)
    scheduler = Scheduler(BlockPool(blocks, size), max_sequences=4, max_tokens=chance.choice([1, 5, 32]), chunk=16)
    course = Course(scheduler)
    target = sequence(0, [0] * 40, 10)
    scheduler.add(sequence(-1, [1] * 50, 10))
    scheduler.add(target)
    number = 0
    while target.finish_reason is None:  # others keep coming as long as it is not done
        while len(scheduler.waiting) < 3:
            number += 1
            scheduler.add(sequence(number, [number % 3] * chance.randrange(1, 50), chance.randrange(1, 10)))
        assert course.step(chance.randrange(4))
        assert course.passes < 400


@pytest.mark.parametrize("ends", ["cancel", "finish"])
def test_a_sequence_that_ends_during_a_pass_leaves_nothing_behind(ends: str) -> None:
    pool = BlockPool(8, 2)
    scheduler = Scheduler(pool)
    one = sequence(3, [1, 2, 3, 4, 5], 4)
    scheduler.add(one)
    (feed,) = scheduler.next()
    end: Callable[[], object] = (lambda: scheduler.cancel(3)) if ends == "cancel" else (lambda: scheduler.finish(one))
    end()
    scheduler.fed(feed, len(feed.tokens))
    assert (pool.num_free, one.num_cached, one.blocks) == (8, 0, [])
    assert not scheduler.cancel(3)
    assert pool.match([1, 2, 3, 4, 5]) == []  # nobody knows whether it was read


def test_guesses_for_which_there_is_no_block_are_left_out_and_nobody_is_put_back_for_them() -> None:
    course = Course(Scheduler(BlockPool(2, 4, reuse=False)))
    for number in range(2):
        course.scheduler.add(sequence(number, [number] * 2, 3))
    course.step()
    course.step(guesses=6)
    assert course.scheduler.num_preempted == 0


def test_prompts_that_are_read_take_turns_behind_the_oldest() -> None:
    course = Course(Scheduler(BlockPool(2000, 16), max_tokens=64, chunk=64))
    for number in range(4):
        course.scheduler.add(sequence(number, [number] * 2000, 1))
    while len(course.scheduler.running) < 4:
        course.step()
    turns = [[feed.sequence.id for feed in course.step()] for _ in range(12)]
    assert {id for turn in turns for id in turn} == {0, 1, 2, 3}
    assert sum(0 in turn for turn in turns) >= 6


def test_a_prompt_that_is_alone_gets_the_whole_pass() -> None:
    scheduler = Scheduler(BlockPool(100, 16), max_tokens=300, chunk=50)
    scheduler.add(sequence(0, [0] * 400, 1))
    assert [len(feed.tokens) for feed in scheduler.next()] == [300]


def test_who_begins_leaves_a_block_for_each_that_runs() -> None:
    course = Course(Scheduler(BlockPool(8, 4, reuse=False)))
    for number in range(4):
        course.scheduler.add(sequence(number, [number] * 8, 4))  # two blocks each, and a third for what follows
    course.run()
    assert course.scheduler.num_preempted == 0


def test_nobody_overtakes_who_waits_for_room() -> None:
    scheduler = Scheduler(BlockPool(10, 4, reuse=False))
    for number, length in enumerate([24, 30, 1]):
        scheduler.add(sequence(number, [number] * length, 1))
    scheduler.next()
    assert [one.id for one in scheduler.running] == [0]
    assert [one.id for one in scheduler.waiting] == [1, 2]


@pytest.mark.parametrize(("reuse", "salt"), [(False, b""), (True, b"other")])
def test_what_could_not_be_found_is_not_waited_for(reuse: bool, salt: bytes) -> None:
    scheduler = Scheduler(BlockPool(100, 4, reuse=reuse))
    same, other = sequence(0, [1] * 30, 1), sequence(1, [1] * 30, 1)
    other.salt = salt
    scheduler.add(same)
    scheduler.add(other)
    assert [len(feed.tokens) for feed in scheduler.next()] == [30, 30]


def test_a_beginning_is_waited_for_up_to_its_last_whole_block_and_no_further() -> None:
    course = Course(Scheduler(BlockPool(100, 4)))
    for number, length in enumerate([8, 9, 12, 7]):
        course.scheduler.add(sequence(number, [5] * length, 1))
    assert [(feed.sequence.id, len(feed.tokens)) for feed in course.step()] == [(0, 8)]
    assert [(feed.sequence.id, len(feed.tokens)) for feed in course.step()] == [(1, 1), (2, 4), (3, 3)]


def test_what_was_drawn_is_found_too() -> None:
    course = Course(Scheduler(BlockPool(100, 4)))
    course.scheduler.add(sequence(0, [1, 2, 3], 2))
    course.run()
    course.scheduler.add(sequence(1, [1, 2, 3, 7, 7, 7], 1))
    assert [feed.start for feed in course.step()] == [4]


def test_a_beginning_that_is_the_whole_of_a_prompt() -> None:
    course = Course(Scheduler(BlockPool(100, 4)))
    for number, length in enumerate([4, 4, 9]):  # the last token is always read, so the second can find nothing
        course.scheduler.add(sequence(number, [5] * length, 1))
    assert [(feed.sequence.id, len(feed.tokens)) for feed in course.step()] == [(0, 4), (1, 4)]
    assert [(feed.sequence.id, len(feed.tokens)) for feed in course.step()] == [(2, 5)]


@given(seed=st.integers(0, 10**6), size=st.integers(1, 9))
def test_where_nobody_may_be_put_back_all_is_read_once(seed: int, size: int) -> None:
    chance = random.Random(seed)
    blocks = -(-50 // size) + chance.randrange(9)
    whole = blocks * size
    pool = BlockPool(blocks, size, reuse=False)
    course = Course(Scheduler(pool, max_tokens=whole, chunk=whole, put_back=False))
    everybody = [sequence(n, [n] * chance.randrange(1, 30), chance.randrange(1, 20)) for n in range(12)]
    for one in everybody:
        course.scheduler.add(one)
    course.run()
    assert course.scheduler.num_preempted == 0
    assert course.fed == sum(len(one.prompt) + len(one.completion) - 1 for one in everybody)
    assert pool.num_free == blocks
