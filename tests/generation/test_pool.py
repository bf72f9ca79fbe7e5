"""Block pool against an obvious one, which remembers every block's whole text and every owner by name."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.generation.blocks import BlockPool

Text = tuple[bytes, tuple[int, ...]]
"""A salt, and all tokens from the first to the block's last."""


@dataclass
class Plain:
    """The oracle: what each block holds, who owns it, and which free ones are kept, the first to go first."""

    num_blocks: int
    size: int
    owners: dict[int, list[int]] = field(default_factory=dict)
    holds: dict[int, Text] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    evicted: bool = False

    def free(self) -> int:
        return self.num_blocks - len(self.owners)

    def take(self, owner: int, blocks: list[int]) -> None:
        for block in blocks:
            self.owners.setdefault(block, []).append(owner)
            if block in self.kept:
                self.kept.remove(block)

    def allocated(self, owner: int, blocks: list[int]) -> None:
        assert len(set(blocks)) == len(blocks)
        assert not set(blocks) & set(self.owners)
        victims = [block for block in blocks if block in self.kept]
        assert victims == self.kept[: len(victims)]  # least recently used first
        assert not victims or self.num_blocks - len(self.owners) - len(self.kept) == len(blocks) - len(victims)
        self.evicted |= bool(victims)
        self.take(owner, blocks)
        for block in blocks:
            self.holds.pop(block, None)

    def dropped(self, owner: int, blocks: list[int], first: dict[Text, int]) -> None:
        for block in reversed(blocks):
            self.owners[block].remove(owner)
            if not self.owners[block]:
                del self.owners[block]
                if block in self.holds and first.get(self.holds[block]) == block:
                    self.kept.append(block)
                else:
                    self.holds.pop(block, None)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 3), blocks=st.integers(1, 16), letters=st.integers(1, 3))
def test_a_pool_is_the_plain_one(seed: int, size: int, blocks: int, letters: int) -> None:
    pool, plain, chance = BlockPool(blocks, size), Plain(blocks, size), random.Random(seed)
    first: dict[Text, int] = {}  # which of several equal blocks is found
    tables: dict[int, list[int]] = {}
    for owner in range(120):
        if tables and (chance.random() < 0.4 or not pool.num_free):
            gone = chance.choice(list(tables))
            table = tables.pop(gone)
            pool.release(table)
            plain.dropped(gone, table, first)
        text = [chance.randrange(letters) for _ in range(chance.randrange(1, 4 * size + 2))]
        salt = chance.choice([b"", b"", b"other"])
        found = pool.match(text, salt)
        plain.take(owner, found)
        wholes: list[Text] = [(salt, tuple(text[: end + size])) for end in range(0, len(text) - size + 1, size)]
        assert [plain.holds[block] for block in found] == wholes[: len(found)]
        assert len(found) * size < len(text)
        if not plain.evicted:
            known = next((n for n, whole in enumerate(wholes) if whole not in first), len(wholes))
            assert len(found) == min(known, (len(text) - 1) // size)
        missing = -(-len(text) // size) - len(found)
        fresh = pool.allocate(missing)
        assert (fresh is None) == (missing > plain.free())
        if fresh is not None:
            for block in fresh:
                first = {whole: place for whole, place in first.items() if place != block}
            plain.allocated(owner, fresh)
            pool.seal([*found, *fresh], text, salt)
            for block, whole in zip(fresh, wholes[len(found) :], strict=False):
                plain.holds[block] = whole
                first.setdefault(whole, block)
        tables[owner] = [*found, *(fresh or [])]
        assert pool.num_free == plain.free()
        for block in range(blocks):
            alone = len(plain.owners.get(block, [])) == 1 and block not in plain.holds
            assert pool.is_writable(block) == alone
    for table in tables.values():
        pool.release(table)
    assert pool.num_free == blocks


def test_what_is_deepest_goes_first_and_what_was_used_last_goes_last() -> None:
    pool = BlockPool(5, 2)
    old, new = pool.allocate(3) or [], pool.allocate(2) or []
    pool.seal(old, [1, 1, 2, 2, 3, 3])
    pool.seal(new, [4, 4, 5, 5])
    pool.release(old)
    pool.release(new)
    assert pool.match([1, 1, 0]) == old[:1]
    pool.release(old[:1])
    assert pool.allocate(5) == [old[2], old[1], new[1], new[0], old[0]]


def test_a_piece_is_found_behind_its_own_beginning_alone() -> None:
    pool = BlockPool(8, 2)
    for begin in (1, 2):
        blocks = pool.allocate(2) or []
        pool.seal(blocks, [begin, begin, 7, begin + 7])
        pool.release(blocks)
    assert len(pool.match([1, 1, 7, 8, 0])) == 2
    assert len(pool.match([1, 1, 7, 9, 0])) == 1  # 7, 9 is known, behind another beginning
    assert pool.match([7, 8, 0]) == []
    assert pool.match([1, 1, 7, 8, 0], b"salt") == []


def test_a_second_block_of_the_same_text_is_free_once_its_owner_leaves() -> None:
    pool = BlockPool(2, 2)
    first, second = pool.allocate(1) or [], pool.allocate(1) or []
    pool.seal(first, [1, 1])
    pool.seal(second, [1, 1])
    pool.release(first)
    assert pool.match([1, 1, 0]) == first
    pool.release(second)
    assert pool.allocate(1) == second
    assert pool.num_free == 0


def test_two_that_read_the_same_side_by_side_go_on_in_one_text() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(1) or [], pool.allocate(2) or []
    pool.seal(first, [1, 1])
    pool.seal(second, [1, 1, 2, 2])
    assert pool.match([1, 1, 2, 2, 0]) == [first[0], second[1]]
