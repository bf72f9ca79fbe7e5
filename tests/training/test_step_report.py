"""Figures of a step, of several layers and of the end of a run."""

from __future__ import annotations

import pytest
import torch

from finemoe.training.report import dead_share, mean_max_vio, recent_loss

LOAD = {1: torch.tensor([0, 0, 8, 0]), 4: torch.tensor([3, 1, 2, 2])}


def test_max_vio_is_the_mean_over_layers() -> None:
    assert mean_max_vio(LOAD) == pytest.approx((3.0 + 0.5) / 2)
    assert mean_max_vio({}) is None


def test_the_dead_are_counted_over_all_layers() -> None:
    assert dead_share(LOAD) == 3 / 8


@pytest.mark.parametrize(("steps", "recent"), [(1, 1), (4, 1), (10, 2), (500, 100), (2000, 100)])
def test_recent_is_the_last_fifth_and_at_most_a_hundred(steps: int, recent: int) -> None:
    losses = [1 / (1 + step) for step in range(steps)]
    expected = sum(losses[steps - recent :]) / recent
    assert recent_loss([{"loss": loss} for loss in losses]) == pytest.approx(expected)


def test_without_steps_there_is_none() -> None:
    assert recent_loss([]) is None
