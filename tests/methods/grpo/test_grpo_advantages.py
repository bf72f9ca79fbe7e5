"""Advantages against their definition, with answers that left their group."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.methods.grpo.advantages import outcome, process

VALUES = st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=1, max_size=12)


def test_of_a_group_by_hand() -> None:
    assert outcome([1.0, 0.0, 0.0, 1.0], "std") == [1.0, -1.0, -1.0, 1.0]
    assert outcome([1.0, 0.0, 0.0, 1.0], "none") == [0.5, -0.5, -0.5, 0.5]
    assert outcome([3.0, 0.0, 0.0], "none") == [2.0, -1.0, -1.0]


def test_raw_is_rejection_sampling_the_reward_itself_and_right_answers_of_a_group_that_is_all_right_too() -> None:
    assert outcome([1.0, 0.0, None, 1.0], "raw") == [1.0, 0.0, 0.0, 1.0]
    assert outcome([1.0, 1.0], "raw") == [1.0, 1.0]
    assert outcome([0.0, 0.0], "raw") == [0.0, 0.0]
    assert process([[(1, 1.0), (2, 0.0)], None], [3, 2], "raw") == [[1.0, 0.0, 0.0], [0.0, 0.0]]


def test_an_error_leaves_its_group_and_never_counts_as_nothing() -> None:
    """Complaint 15 of post-training."""
    assert outcome([1.0, None, 0.0], "std") == [1.0, 0.0, -1.0]
    assert outcome([1.0, None, 1.0], "std") == [0.0, 0.0, 0.0], "counted as 0 it would have made the others good"
    assert outcome([None, None], "std") == [0.0, 0.0]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, -2.3, 1e-9])
def test_equal_rewards_teach_exactly_nothing(value: float) -> None:
    """Complaint 14 of post-training: in floating point, the mean of equal numbers may differ from them."""
    assert outcome([value] * 7, "std") == [0.0] * 7
    assert process([[(1, value)]] * 7, [2] * 7, "std") == [[0.0, 0.0]] * 7


@given(VALUES)
def test_advantages_have_mean_zero_and_spread_one(values: list[float | None]) -> None:
    found = outcome(values, "std")
    known = [one for one, value in zip(found, values, strict=True) if value is not None]
    assert all(one == 0 for one, value in zip(found, values, strict=True) if value is None)
    if any(known):
        assert math.fsum(known) == pytest.approx(0, abs=1e-6)
        assert math.fsum(one * one for one in known) / len(known) == pytest.approx(1)


@pytest.mark.parametrize("values", [[0.1 + 0.2, 0.3, 0.3], [1.2345678, 1.2345679, 1.2345678], [1e6, 1e6 + 0.5]])
def test_rounding_is_no_merit(values: list[float]) -> None:
    assert outcome(values, "std") == [0.0] * len(values)


def test_values_of_any_size_have_a_spread() -> None:
    assert outcome([1e300, -1e300], "std") == [1.0, -1.0]


def test_of_steps_by_hand() -> None:
    """DeepSeekMath 4.1.3: rewards 1, 0 and 1 of three steps of two answers; mean 2/3, standard deviation sqrt(2)/3."""
    spread = math.sqrt(2) / 3
    good, bad = (1 - 2 / 3) / spread, (0 - 2 / 3) / spread
    found = process([[(2, 1.0), (4, 0.0)], [(1, 1.0)]], [5, 2], "std")
    assert found[0] == pytest.approx([good + bad, good + bad, bad, bad, 0.0])
    assert found[1] == pytest.approx([good, 0.0])


def test_steps_that_could_not_be_judged_count_nowhere() -> None:
    found = process([None, [(1, 1.0)], [(1, 0.0)]], [2, 1, 1], "std")
    assert found == [[0.0, 0.0], [1.0], [-1.0]]


def test_a_step_that_ends_beyond_the_answer_ends_with_it() -> None:
    assert process([[(9, 1.0)], [(1, 0.0)]], [2, 1], "std") == [[1.0, 1.0], [-1.0]]
