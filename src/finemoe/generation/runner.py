"""Runner: what sequences feed, through the model and its cache in blocks, in flat passes.

A pass holds tokens of many sequences, one behind the other and without padding: some decode, some read a piece of their
prompt. With `steady`, passes are shaped so that what a sequence gets depends on it alone, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from finemoe.core.errors import DataError
from finemoe.core.memory import available_on
from finemoe.generation.sequence import Constraint
from finemoe.generation.steady import least_tokens, steady_rows
from finemoe.model.attention.blocks import Group
from finemoe.model.quantised.blocks import states_type
from finemoe.model.transformer import Transformer

BLOCK_SIZE = 32
_SHARE_OF_MEMORY = 0.25
_MOST_BLOCKS = 1 << 14


class Feed(Protocol):
    """Tokens of one sequence that go through the model next."""

    @property
    def blocks(self) -> Sequence[int]:
        """The sequence's table: it covers all tokens up to the last of these."""

    @property
    def start(self) -> int:
        """Position of the first token."""

    @property
    def tokens(self) -> Sequence[int]:
        """Ids."""

    @property
    def wants(self) -> int:
        """Hidden states wanted, of the last so many."""

    @property
    def copies(self) -> Sequence[tuple[int, int]]:
        """Blocks to copy first, from and to."""

    @property
    def constraint(self) -> Constraint | None:
        """What holds for its experts."""


@dataclass(frozen=True)
class Ahead:
    """What a multi-token prediction module reads of one sequence."""

    blocks: Sequence[int]
    """The sequence's table."""
    start: int
    """Position of the first token."""
    hidden: Tensor
    """[tokens, hidden]: `States.all`, or what the module made of it, to look further ahead."""
    following: Sequence[int]
    """The id after each."""


@dataclass(frozen=True)
class Routes:
    """Which experts the tokens of a feed went through in one layer."""

    experts: Tensor
    """[tokens, k] int64, best first."""
    gates: Tensor
    """[tokens, k]: what their outputs were weighed by."""
    shared: Tensor | None
    """[tokens]: share of the shared experts in the layer's output; None without them."""


@dataclass(frozen=True)
class States:
    """What a pass made of one feed."""

    logits: Tensor
    """[wants, vocab]: of what follows the last tokens."""
    all: Tensor
    """[tokens, hidden]: of every token."""
    routes: Mapping[int, Routes] = field(default_factory=dict)
    """By layer, where they were asked for."""
    experts: Mapping[int, list[list[int]]] = field(default_factory=dict)
    """By layer, where they alone were asked for: of every token, best first."""


class Runner:
    """A model and its cache. Keeps nothing of a sequence but what lies in the cache."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype | None = None,
        steady: bool = False,
    ) -> None:
        """Make the cache.

        Args:
            model: in eval mode.
            num_blocks: of the cache; one more is made, for filling that nobody reads.
            block_size: tokens of a block.
            dtype: of the cache; None: the weights'.
            steady: every sequence gets the same bits whoever runs beside it, at the price of passes that are not full.
        """
        self.model = model
        self.cache = model.new_blocks(num_blocks + 1, block_size, dtype)
        self.block_size = block_size
        self._spare = num_blocks
        self._size = block_size
        self._least = least_tokens(model) if steady else 0
        self._rows = steady_rows(model) if steady else 0

    @torch.inference_mode()
    def run(self, feeds: Sequence[Feed], *, routes: bool = False, experts: bool = False) -> list[States]:
        """All of `feeds`; those under one constraint share their passes.

        Args:
            feeds: of different sequences.
            routes: report which experts were chosen, and how their outputs were weighed: the slower way.
            experts: report which experts were chosen.
        """
        for feed in feeds:
            for source, target in feed.copies:
                for layer in self.cache:
                    layer.copy(source, target)
        found: dict[int, States] = {}
        for numbers in self._passes(feeds):
            part = [feeds[number] for number in numbers]
            found.update(zip(numbers, self._pass(part, routes, experts), strict=True))
        return [found[number] for number in range(len(feeds))]

    @torch.inference_mode()
    def ahead(self, parts: Sequence[Ahead], depth: int = 1) -> list[tuple[Tensor, Tensor]]:
        """One of the model's multi-token prediction modules over `parts`, in one pass.

        Returns, of each, two `[tokens, hidden]`: what a next depth reads, and what gives the logits of the token after
        the one that followed.
        """
        order = sorted(range(len(parts)), key=lambda number: len(parts[number].following))
        rows = [(list(parts[n].following), parts[n].start, list(parts[n].blocks)) for n in order]
        device = self.model.head_weight.device
        following = torch.tensor([[token for ids, _, _ in rows for token in ids]], device=device)
        hidden = torch.cat([parts[n].hidden for n in order])[None]
        both = self.model.ahead(hidden, following, list(self._groups(rows)), self.cache, depth)
        pieces = [states[0].split([len(ids) for ids, _, _ in rows]) for states in both]
        found = dict(zip(order, zip(*pieces, strict=True), strict=True))
        return [found[number] for number in range(len(parts))]

    def _passes(self, feeds: Sequence[Feed]) -> Iterator[list[int]]:
        """Which feeds share a pass."""
        by_constraint: dict[int, list[int]] = {}
        for number, feed in enumerate(feeds):
            by_constraint.setdefault(id(feed.constraint), []).append(number)
        for numbers in by_constraint.values():
            if not self._rows:
                yield sorted(numbers, key=lambda number: len(feeds[number].tokens))
                continue
            single = [number for number in numbers if len(feeds[number].tokens) == 1 and feeds[number].start > 0]
            yield from ([number] for number in numbers if number not in set(single))
            yield from (single[first : first + self._rows] for first in range(0, len(single), self._rows))

    def _pass(self, feeds: Sequence[Feed], routes: bool, experts: bool) -> list[States]:
        """One forward pass over feeds sorted by length."""
        tokens, groups = self._filled(feeds)
        device = self.model.head_weight.device
        positions = torch.cat([group.positions.flatten() for group in groups])[None]
        output = self.model(
            torch.tensor([tokens], device=device),
            positions=positions.to(device),
            cache=self.cache,
            groups=groups,
            constraint=feeds[0].constraint,
            record=routes,
        )
        hidden = output.hidden[0]
        ends = list(accumulate(len(feed.tokens) for feed in feeds))
        logits = self._logits(hidden, feeds, ends)
        taken: dict[int, list[list[int]]] = {}
        if experts:  # all at once: a tensor for each sequence would take longer than the numbers
            by_layer = output.routing.items()
            taken = {layer: one.expert_ids.tolist() for layer, one in by_layer if one.expert_ids is not None}
        found, first = [], 0
        for last, rows in zip(ends, logits, strict=True):
            chosen = {
                layer: Routes(
                    record.decision.expert_ids[first:last],
                    record.decision.gate_weights[first:last],
                    None if record.shared_share is None else record.shared_share[first:last],
                )
                for layer, record in output.routing.items()
                if record.decision is not None
            }
            own = {layer: ids[first:last] for layer, ids in taken.items()}
            found.append(States(rows, hidden[first:last], chosen, own))
            first = last
        return found

    def _logits(self, hidden: Tensor, feeds: Sequence[Feed], ends: Sequence[int]) -> Sequence[Tensor]:
        """Of each feed, `[wants, vocab]`. Where passes are steady, of as many rows in every pass that decodes."""
        rows = [row for feed, end in zip(feeds, ends, strict=True) for row in range(end - feed.wants, end)]
        if not rows:
            return [hidden.new_empty(0, self.model.config.vocab_size)] * len(feeds)
        whole = len(rows) == len(hidden) or (self._rows and len(hidden) == self._rows)
        logits = self.model.logits(hidden if whole else hidden[rows])
        return logits[: len(rows)].split([feed.wants for feed in feeds])

    def _filled(self, feeds: Sequence[Feed]) -> tuple[list[int], list[Group]]:
        """The ids of a pass and its groups; where passes are steady, filled up to the shape that all have."""
        rows = [(list(feed.tokens), feed.start, list(feed.blocks)) for feed in feeds]
        if self._rows and len(rows) == 1 and (len(rows[0][0]) > 1 or rows[0][1] == 0):
            ids, start, blocks = rows[0]  # the filling stands behind the prompt, in a block that nobody reads
            ids += [0] * (self._least - len(ids))
            blocks += [self._spare] * (-(-(start + len(ids)) // self._size) - len(blocks))
        elif self._rows:
            rows += [([0], 0, [self._spare])] * (self._rows - len(rows))
        return [token for ids, _, _ in rows for token in ids], list(self._groups(rows))

    def _groups(self, rows: Sequence[tuple[list[int], int, list[int]]]) -> Iterator[Group]:
        device = self.model.head_weight.device
        first, begin = 0, 0
        for end in range(1, len(rows) + 1):
            width = len(rows[begin][0])
            if end < len(rows) and len(rows[end][0]) == width:
                continue
            part = rows[begin:end]
            longest = max(len(blocks) for _, _, blocks in part)
            tables = torch.tensor([blocks + [self._spare] * (longest - len(blocks)) for _, _, blocks in part])
            starts = torch.tensor([[start] for _, start, _ in part])
            positions = starts + torch.arange(width)
            yield Group(first, positions.to(device), tables.to(device), self._size)
            first, begin = first + width * len(part), end


def cache_bytes(model: Transformer, lengths: Iterable[int]) -> int:
    """What keys and values of sequences of `lengths` tokens take together, so that free memory does not matter."""
    blocks = sum(length // BLOCK_SIZE + 2 for length in lengths)
    numbers = sum(one.attention.cache_elements_per_token() for one in [*model.config.blocks, *model.config.mtp])
    return blocks * BLOCK_SIZE * numbers * states_type(model.embedding.weight).itemsize


def blocks_for(model: Transformer, size: int, dtype: torch.dtype | None, given: int | None) -> int:
    """How many blocks of `size` tokens `given` bytes hold, or a share of the free memory where nothing is given.

    Raises:
        DataError: not one.
    """
    weight = model.embedding.weight
    numbers = sum(one.attention.cache_elements_per_token() for one in [*model.config.blocks, *model.config.mtp])
    block = size * numbers * (dtype or states_type(weight)).itemsize
    if given is None:
        room, most = int(_SHARE_OF_MEMORY * (available_on(weight.device) or 1 << 31)), _MOST_BLOCKS
    else:
        room = most = given
    if room < block:
        raise DataError(
            f"{room:,} bytes for the cache have no room for a block of {size} tokens, which takes {block:,}"
        )
    return min(room // block, most)
