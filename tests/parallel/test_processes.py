"""The helper that runs a function in several processes: results by rank, errors told, nothing left hanging."""

from __future__ import annotations

import time

import pytest
import torch
from torch import distributed

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
