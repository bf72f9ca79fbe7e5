"""The order in which each rank of a pipeline does its work, for every schedule that a plan knows.

Schedules: 1F1B (Narayanan et al., 2104.04473), interleaved 1F1B (the same), ZB1P, which is ZB-H1 of the zero-bubble
paper (Qi et al., 2401.10241), ZBV (Qi et al., 2405.15362), DualPipe (DeepSeek-V3, 2412.19437, section 3.2.1) and
DualPipeV, its half on half as many ranks. In the last three a rank holds two chunks of the model, and in DualPipe
micro-batches enter from both ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from finemoe.core.errors import ConfigError

Schedule = Literal["1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
TWO_CHUNKS = frozenset({"zbv", "dualpipe", "dualpipev"})
"""Schedules in which each rank holds two pieces of the model."""
Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its part for the input; its part for the weights."""


@dataclass(frozen=True)
class Work:
    """One piece of work of a rank. `chain` 1 holds the micro-batches that enter at the far end (DualPipe)."""

    kind: Kind
    stage: int
    micro_batch: int
    chain: int = 0


Order = list[tuple[Work, ...]]
"""What a rank does, one after the other; two in one tuple are a forward and a backward that overlap."""


def orders(schedule: Schedule, ranks: int, micro_batches: int, virtual: int = 1) -> list[Order]:
    """The order of every rank.

    Args:
        schedule: one of SCHEDULES.
        ranks: of the pipeline.
        micro_batches: of one step; DualPipe halves them between its two ends.
        virtual: chunks a rank, for interleaved alone.

    Raises:
        ConfigError: too few micro-batches for the schedule, or a number that it cannot deal out.
    """
    require(schedule, ranks, micro_batches, virtual)
    if schedule == "1f1b":
        return [_one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "interleaved":
        return [_interleaved(rank, ranks, micro_batches, virtual) for rank in range(ranks)]
    if schedule == "zb1p":
        return [_zb1p(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "zbv":
        return [_zbv(rank, ranks, micro_batches) for rank in range(ranks)]
    if schedule == "dualpipev":
        return [
            _dual(_Chunks((0, rank), (0, 2 * ranks - 1 - rank)), rank, ranks, micro_batches) for rank in range(ranks)
        ]
    made = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)  # both halves of the ranks do the same, with the two ends exchanged
        ends = ((0, rank), (1, ranks - 1 - rank)) if rank == near else ((1, ranks - 1 - rank), (0, rank))
        made.append(_dual(_Chunks(*ends), near, ranks // 2, micro_batches // 2))
    return made


def require(schedule: Schedule, ranks: int, micro_batches: int, virtual: int = 1) -> None:
    """Refuse what the schedule cannot deal out.

    Raises:
        ConfigError: with the numbers, and what to change.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule {schedule!r}: known are {', '.join(SCHEDULES)}")
    if schedule != "interleaved" and virtual != 1:
        raise ConfigError(f"{virtual} virtual stages go with the interleaved schedule, not with {schedule}")
    if ranks == 1:
        return
    if schedule == "dualpipe" and (ranks % 2 or micro_batches % 2):
        raise ConfigError(f"dualpipe: {ranks} stages and {micro_batches} micro-batches must both be even")
    fewest = 2 * ranks if schedule in ("dualpipe", "dualpipev") else ranks
    if micro_batches < fewest:
        raise ConfigError(
            f"{schedule}: a pipeline of {ranks} stages needs at least {fewest} micro-batches a step, and there are "
            f"{micro_batches}: raise training.tokens_per_step, or lower training.micro_batch_tokens or "
            "parallel.pipeline"
        )
    if schedule == "interleaved" and micro_batches % ranks:
        raise ConfigError(f"interleaved: {micro_batches} micro-batches are no multiple of {ranks} stages")


def _one_forward_one_backward(rank: int, ranks: int, count: int) -> Order:
    warm = min(count, ranks - 1 - rank)
    order: Order = [(Work("F", rank, m),) for m in range(warm)]
    for m in range(count - warm):
        order += [(Work("F", rank, warm + m),), (Work("B", rank, m),)]
    return order + [(Work("B", rank, m),) for m in range(count - warm, count)]


def _interleaved(rank: int, ranks: int, count: int, virtual: int) -> Order:
    def forward(i: int) -> Work:
        group, within = divmod(i, ranks * virtual)
        return Work("F", within // ranks * ranks + rank, group * ranks + within % ranks)

    def backward(i: int) -> Work:
        group, within = divmod(i, ranks * virtual)
        return Work("B", (virtual - 1 - within // ranks) * ranks + rank, group * ranks + within % ranks)

    total = count * virtual
    warm = min(total, 2 * (ranks - 1 - rank) + (virtual - 1) * ranks)
    order: Order = [(forward(i),) for i in range(warm)]
    for i in range(total - warm):
        order += [(forward(warm + i),), (backward(i),)]
    return order + [(backward(i),) for i in range(total - warm, total)]


def _zb1p(rank: int, ranks: int, count: int) -> Order:
    """1F1B, whose last ranks put the products for the weights off until the first ones have work for no other time."""
    order: Order = []
    behind = 0  # micro-batches whose input part is done and whose weights are not
    for (work,) in _one_forward_one_backward(rank, ranks, count):
        if work.kind == "F":
            order.append((work,))
            continue
        order.append((Work("I", rank, work.micro_batch),))
        behind += 1
        if behind > rank:
            order.append((Work("W", rank, work.micro_batch - rank),))
            behind -= 1
    return order + [(Work("W", rank, m),) for m in range(count - behind, count)]


@dataclass(frozen=True)
class _Chunks:
    """The two pieces of a rank as (chain, stage)."""

    first: tuple[int, int]
    second: tuple[int, int]


class _Counting:
    """Makes the next work of a kind, numbering micro-batches by chunk."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = (chunks.first, chunks.second)
        self._next: dict[tuple[str, int], int] = {}
        self._waiting: list[tuple[int, int]] = []

    def _number(self, kind: str, chunk: int) -> int:
        number = self._next.get((kind, chunk), 0)
        self._next[kind, chunk] = number + 1
        return number

    def _work(self, kind: Kind, chunk: int, number: int) -> Work:
        chain, stage = self._chunks[chunk]
        return Work(kind, stage, number, chain)

    def forward(self, chunk: int) -> Work:
        return self._work("F", chunk, self._number("F", chunk))

    def backward(self, chunk: int, whole: bool = True) -> Work:
        number = self._number("B", chunk)
        if not whole:
            self._waiting.append((chunk, number))
        return self._work("B" if whole else "I", chunk, number)

    def weights(self) -> Iterator[tuple[Work, ...]]:
        """The oldest that waits, if any does."""
        if self._waiting:
            yield (self._work("W", *self._waiting.pop(0)),)


def _zbv(rank: int, ranks: int, count: int) -> Order:
    """A fixed order with a forward, an input part and a weight part of each chunk in turn once it runs."""
    made = max(count, 2 * ranks - 1)
    near, far = rank, 2 * ranks - 1 - rank
    order: Order = []
    kinds: tuple[Kind, ...] = ("F", "I", "W")
    done = {(kind, stage): 0 for kind in kinds for stage in (near, far)}

    def add(*steps: tuple[Kind, int], times: int = 1) -> None:
        for kind, stage in steps * times:
            order.append((Work(kind, stage, done[kind, stage]),))
            done[kind, stage] += 1

    add(("F", near), times=2 * (ranks - rank) - 1)
    for _ in range(rank):
        add(("F", far), ("F", near))
    for _ in range(ranks - rank):
        add(("F", far), ("I", far), ("W", far))
    while done["F", far] < done["F", near] or done["F", near] < made:
        if done["F", near] < made:
            add(("F", near))
        add(("I", near), ("W", near), ("F", far), ("I", far), ("W", far))
    for _ in range(rank):
        add(("I", near), ("I", far))
    for _ in range(ranks - rank):
        add(("I", near), ("W", near))
    add(("W", far), times=done["I", far] - done["W", far])
    add(("W", near), times=done["I", near] - done["W", near])
    return [(work,) for (work,) in order if work.micro_batch < count]


def _dual(chunks: _Chunks, rank: int, ranks: int, count: int) -> Order:
    """DualPipe's eight phases (V3 Figure 5), for the `rank`-th from an end where `ranks` lie before the turn."""
    make = _Counting(chunks)
    after = ranks - 1 - rank
    order: Order = [(make.forward(0),) for _ in range(2 * after)]
    for _ in range(rank + 1):
        order += [(make.forward(0),), (make.forward(1),)]
    for _ in range(after):
        order += [(make.backward(1, whole=False),), *make.weights(), (make.forward(1),)]
    for i in range(count - 2 * ranks + rank + 1):
        first = (make.forward(0), make.backward(1))
        order += [(work,) for work in first] if i == 0 and after == 0 else [first]  # apart at the turn: less to wait
        order.append((make.forward(1), make.backward(0)))
    for _ in range(after):
        order += [(make.backward(1),), (make.forward(1), make.backward(0))]
    whole = True
    for i in range(rank + 1):
        whole = whole and not (i == (rank + 1) // 2 and rank % 2 == 1)
        order.append((make.backward(1, whole),))
        whole = whole and not (i == (rank + 1) // 2 and rank % 2 == 0)
        order.append((make.backward(0, whole),))
    for _ in range(after):
        order += [*make.weights(), (make.backward(0, whole),)]
    for _ in range(rank + 1):
        order += make.weights()
    return order
