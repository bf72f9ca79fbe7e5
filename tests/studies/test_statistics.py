"""Intervals and verdicts against scipy and against the rule as stated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from finemoe.studies.statistics import interval, paired

LOSSES = st.lists(st.tuples(st.floats(1, 5), st.floats(1, 5)), min_size=2, max_size=8)


def test_interval_of_three_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])  # sd 1, standard error 1 / sqrt 3, t(0.975, 2) = 4.302653
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / 3**0.5)
    assert found.high == pytest.approx(2 + 4.302653 / 3**0.5)


def test_interval_of_one_has_no_ends() -> None:
    assert interval([1.5]) == (found := interval([1.5]))
    assert (found.mean, found.low, found.high) == (1.5, None, None)


@given(LOSSES)
def test_paired_difference_is_scipy_s(losses: list[tuple[float, float]]) -> None:
    a, b = ({seed: pair[side] for seed, pair in enumerate(losses)} for side in (0, 1))
    found = paired(a, b)
    differences = [x - y for x, y in losses]
    if max(differences) - min(differences) < 1e-6:
        return  # scipy warns of lost precision
    reference = stats.ttest_rel(list(a.values()), list(b.values()))
    ends = reference.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    if abs(reference.pvalue - 0.05) > 1e-9:
        assert (found.verdict != "undecided") == (reference.pvalue < 0.05)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "says"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.11, 2.2], "better", "over 3 seeds lies below 0"),
        ([2.0, 2.11, 2.2], [1.0, 1.1, 1.2], "worse", "over 3 seeds lies above 0"),
        ([1.0, 3.0], [2.0, 2.0], "undecided", "over 2 seeds contains 0"),
        ([1.0, 1.0], [1.0, 1.0], "undecided", "contains 0"),
        ([1.0], [2.0], "undecided", "one seed: no interval"),
    ],
)
def test_verdicts(a: list[float], b: list[float], verdict: str, says: str) -> None:
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert found.verdict == verdict
    assert says in found.reason


def test_pairing_decides_what_unpaired_intervals_could_not() -> None:
    a, b = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.11, 2: 3.1}
    assert interval(list(a.values())).high > interval(list(b.values())).low  # type: ignore[operator]
    assert paired(a, b).verdict == "better"


def test_only_common_seeds_count_and_their_order_does_not() -> None:
    full = paired({0: 1.0, 1: 2.0, 5: 9.0}, {7: 0.0, 1: 2.5, 0: 1.4})
    assert full.difference.mean == pytest.approx(-0.45)
    with pytest.raises(ValueError, match="without a common seed"):
        paired({0: 1.0}, {1: 1.0})
