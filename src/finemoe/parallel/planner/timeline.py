"""A pipeline run through on paper: when each rank does what, how long it waits, how much it holds at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finemoe.parallel.planner.schedules import Order, Schedule, Work, orders


@dataclass(frozen=True)
class Costs:
    """Durations of the work on one chunk of the model, in any unit of time."""

    forward: float
    backward: float
    """Whole: what W is a part of."""
    weights: float
    overlapped: float | None = None
    """A forward and a backward at once; None: one after the other."""
    send: float = 0.0
    """Between two ranks."""

    @property
    def both(self) -> float:
        """F&B of the papers."""
        return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of(self, pair: tuple[Work, ...]) -> float:
        """How long one piece of work takes, or two that overlap."""
        if len(pair) == 2:
            return self.both
        kind = pair[0].kind
        inputs = self.backward - self.weights
        return {"F": self.forward, "B": self.backward, "I": inputs, "W": self.weights}[kind]


@dataclass(frozen=True)
class Span:
    """Work of a rank from `start` to `end`."""

    rank: int
    work: tuple[Work, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline."""

    spans: tuple[Span, ...]
    ranks: int

    @property
    def length(self) -> float:
        """From the first work to the last."""
        return max(span.end for span in self.spans)

    def idle(self, rank: int) -> float:
        """How long a rank waits between the step's first work and its last, anybody's."""
        return self.length - sum(span.end - span.start for span in self.spans if span.rank == rank)

    @property
    def bubble(self) -> float:
        """The most that any rank waits."""
        return max(self.idle(rank) for rank in range(self.ranks))

    def held(self, rank: int) -> int:
        """The most chunks of activations that a rank holds at once: from a forward to the end of its backward.

        Where a backward is in two parts, products for the weights still need them: until the second.
        """
        events: list[tuple[float, int]] = []
        for span in self.spans:
            if span.rank == rank:
                for work in span.work:
                    if work.kind == "F":
                        events.append((span.start, 1))
                    elif work.kind in ("B", "W"):
                        events.append((span.end, -1))
        most = now = 0
        for _, change in sorted(events):
            now += change
            most = max(most, now)
        return most


def simulate(schedule: Schedule, ranks: int, micro_batches: int, costs: Costs, virtual: int = 1) -> Timeline:
    """Run a step through on paper.

    Args:
        schedule, ranks, micro_batches, virtual: as in `schedules.orders`.
        costs: of one chunk, the same on every rank.

    Raises:
        ConfigError: the schedule cannot deal that out.
    """
    chunks = 2 if schedule in ("zbv", "dualpipev") else virtual
    stages = ranks * chunks
    return run(orders(schedule, ranks, micro_batches, virtual), stages, costs)


def run(by_rank: list[Order], stages: int, costs: Costs) -> Timeline:
    """Every rank does its work in order, as soon as what it waits for has come.

    Raises:
        ValueError: two ranks wait for each other.
    """
    homes: dict[tuple[int, int], int] = {}
    for rank, order in enumerate(by_rank):
        homes.update({(work.chain, work.stage): rank for pair in order for work in pair})
    ends: dict[Work, float] = {}
    clock = [0.0] * len(by_rank)
    at = [0] * len(by_rank)
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(by_rank):
            while at[rank] < len(order):
                pair = order[at[rank]]
                ready = _ready(pair, rank, stages, ends, homes, costs.send)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                clock[rank] = start + costs.of(pair)
                ends.update(dict.fromkeys(pair, clock[rank]))
                spans.append(Span(rank, pair, start, clock[rank]))
                at[rank] += 1
                moved = True
    waiting = [rank for rank, order in enumerate(by_rank) if at[rank] < len(order)]
    if waiting:
        raise ValueError(f"ranks {waiting} wait for each other: the schedule cannot run")
    return Timeline(tuple(spans), len(by_rank))


def _ready(
    pair: tuple[Work, ...],
    rank: int,
    stages: int,
    ends: Mapping[Work, float],
    homes: Mapping[tuple[int, int], int],
    send: float,
) -> float | None:
    """When all that the work needs is there; None where something has not been begun."""
    moment = 0.0
    for work in pair:
        for need in _needs(work, stages):
            known = [ends[one] for one in need if one in ends]
            if not known:
                return None
            far = homes[need[0].chain, need[0].stage] != rank
            moment = max(moment, known[0] + (send if far else 0.0))
    return moment


def _needs(work: Work, stages: int) -> list[tuple[Work, ...]]:
    """What must be done before; each in the forms that it may have."""
    chain, stage, number = work.chain, work.stage, work.micro_batch
    if work.kind == "F":
        return [(Work("F", stage - 1, number, chain),)] if stage else []
    if work.kind == "W":
        return [(Work("I", stage, number, chain),)]
    needs: list[tuple[Work, ...]] = [(Work("F", stage, number, chain),)]
    if stage < stages - 1:
        needs.append((Work("B", stage + 1, number, chain), Work("I", stage + 1, number, chain)))
    return needs
