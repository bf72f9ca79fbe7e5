"""Closed formulas of schedules against the schedules themselves, run through on paper."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from finemoe.core.errors import ConfigError
from finemoe.parallel.planner.bubbles import bubble, chunks_held, chunks_of
from finemoe.parallel.planner.schedules import SCHEDULES, Schedule, Work, orders
from finemoe.parallel.planner.timeline import Costs, run, simulate

SHAPES = ((2, 4), (2, 12), (4, 8), (4, 20), (6, 24), (8, 32), (16, 48))
# What the papers suppose: the part for the input takes as long as a forward. Then what nobody supposes.
EVEN = (Costs(1, 2, 1), Costs(1, 2, 1, overlapped=2.4), Costs(1.5, 2.75, 1.25, overlapped=3.5))
UNEVEN = (Costs(1.3, 2.7, 1.1), Costs(1, 2.2, 0.9), Costs(2, 3, 1.4))


def exact(schedule: Schedule) -> tuple[Costs, ...]:
    return {"dualpipe": EVEN, "dualpipev": EVEN, "zbv": (*EVEN, *UNEVEN[:2])}.get(schedule, (*EVEN, *UNEVEN))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "count"), SHAPES)
def test_the_formula_is_the_simulated_wait(schedule: Schedule, ranks: int, count: int) -> None:
    virtual = 3 if schedule == "interleaved" else 1
    count -= count % ranks
    for costs in exact(schedule):
        line = simulate(schedule, ranks, count, costs, virtual)
        assert bubble(schedule, ranks, costs) == pytest.approx(line.bubble, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "count"), SHAPES)
def test_no_rank_holds_more_than_said_and_one_holds_as_much(schedule: Schedule, ranks: int, count: int) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    count -= count % ranks
    line = simulate(schedule, ranks, count, Costs(1, 2, 1), virtual)
    assert max(line.held(rank) for rank in range(ranks)) == chunks_held(schedule, ranks, count, virtual)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_micro_batch_goes_forward_and_back_once_through_every_chunk(schedule: Schedule) -> None:
    ranks, count = 4, 12
    virtual = 2 if schedule == "interleaved" else 1
    done = Counter(
        (work.kind if work.kind != "I" else "B", work.chain, work.stage, work.micro_batch)
        for order in orders(schedule, ranks, count, virtual)
        for pair in order
        for work in pair
        if work.kind != "W"
    )
    stages = ranks * chunks_of(schedule, virtual)
    chains = ((0, count // 2), (1, count // 2)) if schedule == "dualpipe" else ((0, count),)
    wanted = {
        (kind, chain, stage, number)
        for chain, numbers in chains
        for kind in "FB"
        for stage in range(stages)
        for number in range(numbers)
    }
    assert set(done) == wanted
    assert set(done.values()) == {1}


def test_the_papers_table_at_v3s_shape() -> None:
    """V3 Table 2 at 16 stages, F = W = 1, B = 2, overlapped 2.5: 45, 15, 7 x 1.5; two of DualPipeV's chunks are one."""
    costs = Costs(1, 2, 1, overlapped=2.5)
    assert [bubble(name, 16, costs) for name in ("1f1b", "zb1p", "dualpipe")] == [45, 15, 10.5]
    halves = Costs(0.5, 1, 0.5, overlapped=1.25)
    assert bubble("dualpipev", 8, halves) == 7 * 0.75
    assert bubble("interleaved", 16, Costs(0.25, 0.5, 0.25)) == 45 / 4


def test_sending_lengthens_a_step() -> None:
    apart = simulate("1f1b", 4, 8, Costs(1, 2, 1, send=0.1))
    assert apart.length > simulate("1f1b", 4, 8, Costs(1, 2, 1)).length + 0.5


@pytest.mark.parametrize(
    ("schedule", "ranks", "count", "virtual", "named"),
    [
        ("dualpipe", 4, 7, 1, "even"),
        ("dualpipe", 4, 6, 1, "at least 8"),
        ("1f1b", 8, 4, 1, "at least 8 micro-batches"),
        ("interleaved", 4, 10, 2, "multiple of 4"),
        ("1f1b", 4, 8, 2, "virtual"),
        ("gpipe", 4, 8, 1, "known are"),
    ],
)
def test_what_a_schedule_cannot_deal_out_is_refused(
    schedule: Any, ranks: int, count: int, virtual: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        orders(schedule, ranks, count, virtual)


def test_a_schedule_that_cannot_run_is_told() -> None:
    order = orders("1f1b", 2, 4)
    order[1] = [order[1][1], order[1][0], *order[1][2:]]  # back before forward
    with pytest.raises(ValueError, match=r"ranks \[0, 1\] wait for each other"):
        run(order, 2, Costs(1, 2, 1))


@pytest.mark.parametrize(("maker", "name"), [(ScheduleZBVZeroBubble, "zbv"), (ScheduleDualPipeV, "dualpipev")])
def test_orders_are_those_that_torch_runs(maker: Any, name: Schedule) -> None:
    """The picture of a plan is the schedule that a run of finemoe has: torch's own lists say so."""
    kinds: dict[str, Any] = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    for ranks, count in ((2, 6), (4, 11)):
        for rank, ours in enumerate(orders(name, ranks, count)):
            stand_in = SimpleNamespace(pp_group_size=ranks, num_stages=2 * ranks, _n_microbatches=count)
            theirs = []
            for action in maker._calculate_single_rank_operations(stand_in, rank):
                if action is not None:
                    parts = action.sub_actions or (action,)
                    theirs.append(
                        tuple(Work(kinds[a.computation_type.name], a.stage_index, a.microbatch_index) for a in parts)
                    )
            assert ours == theirs


def test_shorter_work_never_waits_longer_than_the_whole() -> None:
    random.seed(0)
    for _ in range(20):
        costs = Costs(random.uniform(0.5, 2), 3, random.uniform(0.5, 1.5))
        for schedule in SCHEDULES:
            line = simulate(schedule, 4, 8, costs)
            assert 0 <= line.bubble < line.length
