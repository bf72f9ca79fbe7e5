"""The helper that runs a function in several processes: results by rank, errors told, nothing left hanging."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
from torch import distributed

from finemoe.parallel.config import Layout
from finemoe.parallel.processes import _ROOM, Processes
from parallel.processes import run


def add(number: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor([number + distributed.get_rank()])
    distributed.all_reduce(total)
    return distributed.get_rank(), total


def fail_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise ValueError("this one")
    time.sleep(60)


def test_results_come_by_rank() -> None:
    (first, total), (second, other) = run(2, add, 0.5)
    assert (first, second) == (0, 1)
    assert total.item() == other.item() == 2.0


def test_an_error_of_one_rank_is_told_at_once() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(?s:.*)ValueError: this one"):
        run(2, fail_on, 1)


def test_a_rank_that_waits_for_ever_is_ended() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 are not done after 2 seconds"):
        run(2, fail_on, 5, deadline=2)


def said(lengths: list[int], late: bool) -> list[list[str]]:
    """What everybody says who says as much as `lengths`, or rank 1 who says little else."""
    world = Processes(Layout(replicate=2), torch.device("cpu"))
    letter = "ab"[world.rank]
    return [world.everyone(letter * (1 if late and world.rank == 0 else length)) for length in lengths]


def test_what_everyone_says_comes_whole_however_long_it_is() -> None:
    """As long as there is room for in one exchange, a letter more, and many more; all alike, or one of them alone."""
    fits = _ROOM - len(pickle.dumps("a" * 300)) + 300
    lengths = [0, fits, fits + 1, 5 * _ROOM, 1]
    assert len(pickle.dumps("a" * fits)) == _ROOM
    for found in run(2, said, lengths, False):
        assert found == [["a" * length, "b" * length] for length in lengths]
    for found in run(2, said, lengths, True):
        assert found == [["a", "b" * length] for length in lengths]
