"""Block pool: who owns which block of the cache, and which blocks hold a text that may be asked for again.

Blocks that hold a whole piece of some text stay findable by it, as long as nobody needs the room: a request that begins
as an earlier one did starts where they part (Kwon et al., 2023, section 4.4; SGLang's prefix cache). A piece is found
by its tokens and by the piece before it, which has a number of its own: nothing but the very same text leads there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple


class _Content(NamedTuple):
    """A whole block of some text."""

    before: int | bytes
    """The number of the content before it; the salt where it is the first."""
    tokens: tuple[int, ...]


class BlockPool:
    """Blocks of one size, each owned by none, one or several sequences."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        """`num_blocks` free blocks of `block_size` tokens. Without `reuse` nothing is ever found again."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a pool needs at least one block of at least one token (got {num_blocks} of {block_size})"
            )
        self.size = block_size
        self.num_blocks = num_blocks
        self.reuse = reuse
        self._owners = [0] * num_blocks
        self._empty = list(range(num_blocks))[::-1]
        self._kept: OrderedDict[int, None] = OrderedDict()  # owned by none and findable, the first to be given up first
        self._contents: dict[int, _Content] = {}
        self._numbers: dict[int, int] = {}  # of a block's content; two blocks of one text have the same
        self._found_by: dict[_Content, int] = {}
        self._next = count()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, those kept for reuse among them."""
        return len(self._empty) + len(self._kept)

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> list[int]:
        """The blocks, now owned once more, of the longest known beginning of `tokens` in whole blocks.

        Never of all of `tokens`: the last has to be fed, as what follows it is wanted. `salt` keeps apart what must not
        mix, such as texts that were read under another constraint.
        """
        blocks: list[int] = []
        before: int | bytes = salt
        for start in range(0, len(tokens) - self.size, self.size):
            block = self._found_by.get(_Content(before, tuple(tokens[start : start + self.size])))
            if block is None:
                break
            before = self._numbers[block]
            blocks.append(block)
        self.share(blocks)
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """So many blocks, owned once; None where not so many are free. What they held is forgotten."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                self._forget(block)
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def seal(self, blocks: Sequence[int], tokens: Sequence[int], salt: bytes = b"") -> None:
        """`blocks` hold `tokens` from position 0 on, and those that are whole will not change any more."""
        if not self.reuse:
            return
        for number in range(len(tokens) // self.size):
            block = blocks[number]
            if block in self._contents:
                continue
            before = self._numbers[blocks[number - 1]] if number else salt
            content = _Content(before, tuple(tokens[number * self.size : (number + 1) * self.size]))
            # Of two that read the same at the same time, the first is found; the other is nobody's but its owner's.
            first = self._found_by.setdefault(content, block)
            self._contents[block] = content
            self._numbers[block] = next(self._next) if first == block else self._numbers[first]

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each."""
        for block in blocks:
            self._kept.pop(block, None)
            self._owners[block] += 1

    def is_writable(self, block: int) -> bool:
        """Whether one sequence alone sees what is written there."""
        return self._owners[block] == 1 and block not in self._contents

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. What is deepest in a text is given up first when room is needed."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            content = self._contents.get(block)
            if content is not None and self._found_by.get(content) == block:
                self._kept[block] = None
            else:
                self._forget(block)
                self._empty.append(block)

    def forget(self) -> None:
        """Nothing is found by its text any more, as where the weights that read it have changed; no block is owned."""
        for block in list(self._contents):
            self._forget(block)
        self._empty += self._kept
        self._kept.clear()

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        self._numbers.pop(block, None)
        if content is not None and self._found_by.get(content) == block:
            del self._found_by[content]
