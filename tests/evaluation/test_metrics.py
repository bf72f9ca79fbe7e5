"""Errors and intervals against closed forms, scipy, and counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from finemoe.core.statistics import wilson
from finemoe.evaluation.metrics import estimate, macro, mcnemar, paired_difference


def ones(count: int) -> list[float]:
    return [1.0] * count


def test_right_or_wrong_has_the_binomial_error_and_wilsons_interval() -> None:
    made = estimate([1.0] * 30 + [0.0] * 70, ones(100), "t")
    assert made.value == pytest.approx(0.3)
    assert made.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    oracle = stats.binomtest(30, 100).proportion_ci(method="wilson")
    assert (made.low, made.high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))
    assert made.method == "binomial"
    assert made.n == 100


@given(right=st.integers(0, 50), wrong=st.integers(0, 50))
def test_wilsons_interval_is_scipys(right: int, wrong: int) -> None:
    n = right + wrong
    if not n:
        return
    low, high = wilson(right / n, n)
    oracle = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert low == pytest.approx(oracle.low, abs=1e-12)
    assert high == pytest.approx(oracle.high, abs=1e-12)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


def test_a_mean_has_the_error_and_at_least_the_interval_of_student() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    made = estimate(values.tolist(), ones(400), "t")
    error = stats.sem(values)
    assert made.method == "ratio"
    assert made.value == pytest.approx(values.mean())
    assert made.standard_error == pytest.approx(error)
    low, high = stats.t.interval(0.95, 399, values.mean(), error)
    assert made.low is not None
    assert made.high is not None
    assert low - 0.15 * error < made.low <= low + 1e-9
    assert high - 1e-9 <= made.high < high + 0.15 * error


def test_the_interval_reaches_further_on_the_side_where_the_tail_is() -> None:
    values = np.random.default_rng(1).exponential(size=20)
    made = estimate(values.tolist(), ones(20), "t")
    low, high = stats.t.interval(0.95, 19, values.mean(), stats.sem(values))
    assert made.low == pytest.approx(low)
    assert made.high is not None
    assert made.high > high + 0.2 * stats.sem(values)


def test_weights_make_the_mean_of_documents_that_of_their_concatenation() -> None:
    bits, sizes = [1.0, 2.0, 4.0], [100.0, 10.0, 1.0]
    made = estimate([b for b in bits for _ in range(50)], [s for s in sizes for _ in range(50)], "t")
    assert made.value == pytest.approx((100 + 20 + 4) / 111)
    drawn = np.random.default_rng(3).integers(150, size=(4000, 150))
    b, s = np.repeat(bits, 50), np.repeat(sizes, 50)
    oracle = ((b * s)[drawn].sum(1) / s[drawn].sum(1)).std()
    assert made.standard_error == pytest.approx(oracle, rel=0.08)  # the jackknife's is a little larger
    for end, side in ((made.low, -1), (made.high, 1)):
        assert end == pytest.approx(made.value + side * 2 * made.standard_error, abs=0.8 * made.standard_error)


def test_equal_streams_give_equal_intervals_and_others_do_not() -> None:
    values = np.random.default_rng(0).normal(size=60).tolist()
    assert estimate(values, ones(60), "a") == estimate(values, ones(60), "a")
    assert estimate(values, ones(60), "a").low != estimate(values, ones(60), "b").low
    assert estimate(values, ones(60), "a").low != estimate(values, ones(60), "a", seed=1).low


def test_one_item_has_no_interval() -> None:
    made = estimate([2.5], [1.0], "t")
    assert (made.value, made.standard_error, made.low, made.method) == (2.5, None, None, "none")


def test_the_macro_mean_counts_every_group_the_same() -> None:
    small, large = estimate([1.0, 0.0], ones(2), "s"), estimate([1.0] * 9 + [0.0], ones(10), "l")
    made = macro([small, large])
    assert made.value == pytest.approx((0.5 + 0.9) / 2)
    assert made.n == 12
    assert made.standard_error == pytest.approx(math.sqrt(0.25 / 1 + 0.09 / 9) / 2)


def test_the_macro_error_is_right_for_small_groups_and_none_where_nothing_tells_it() -> None:
    generator = np.random.default_rng(0)
    made = []
    for _ in range(3000):
        drawn = generator.random((8, 2)) < 0.5  # eight groups of two items
        made.append(macro([estimate(list(map(float, group)), ones(2), "g") for group in drawn]))
    real = np.var([one.value for one in made])
    assert np.mean([(one.standard_error or 0.0) ** 2 for one in made]) == pytest.approx(real, rel=0.1)
    alone = [estimate([value], ones(1), "g") for value in (1.0, 0.0)]
    all_wrong = [estimate([0.0, 0.0], ones(2), "g")] * 2
    for groups in ([*alone, *all_wrong], alone, all_wrong):
        assert (macro(groups).standard_error, macro(groups).low) == (None, None)


def test_a_paired_difference_by_hand() -> None:
    first = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    second = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    made = paired_difference(first, second, ones(6), lower_is_better=False, stream="t")
    differences = [0, 1, 1, 0, 1, -1]
    assert made.value == pytest.approx(2 / 6)
    error = np.std(differences, ddof=1) / math.sqrt(6)
    assert made.standard_error == pytest.approx(error)
    assert (made.low, made.high) == pytest.approx(stats.t.interval(0.95, 5, 2 / 6, error))
    assert made.test == "mcnemar"
    assert made.p_value == pytest.approx(2 * (math.comb(4, 0) + math.comb(4, 1)) / 2**4)
    assert made.verdict == "undecided"


def test_mcnemar_is_a_coin_over_the_items_that_one_got_right() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(8, 0) == pytest.approx(2 * 0.5**8)
    assert mcnemar(3, 3) == 1.0


@pytest.mark.parametrize(("lower_is_better", "verdict"), [(False, "better"), (True, "worse")])
def test_verdicts_know_which_way_is_up(lower_is_better: bool, verdict: str) -> None:
    first, second = [1.0] * 20, [0.0] * 20
    made = paired_difference(first, second, ones(20), lower_is_better=lower_is_better, stream="t")
    assert made.verdict == verdict
    rng = np.random.default_rng(0)
    low = rng.normal(2.0, 1.0, 200)
    high = low + 0.1 + rng.normal(0, 0.1, 200)
    made = paired_difference(high.tolist(), low.tolist(), ones(200), lower_is_better=lower_is_better, stream="t")
    assert made.test == "ratio"
    assert made.verdict == verdict
    assert made.low is not None
    assert made.low > 0


def test_pairing_decides_what_single_errors_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(2.0, 1.0, 200)
    one, two = hard.tolist(), (hard + 0.05 + rng.normal(0, 0.05, 200)).tolist()
    error = estimate(one, ones(200), "t").standard_error
    made = paired_difference(one, two, ones(200), lower_is_better=True, stream="t")
    assert error is not None
    assert error > 0.05
    assert made.verdict == "better"


def test_the_same_answers_are_undecided() -> None:
    for values in ([1.0, 0.0, 1.0], [1.5, 2.5, 0.1]):
        assert paired_difference(values, values, ones(3), lower_is_better=True, stream="t").verdict == "undecided"


def test_no_difference_is_called_one_of_twenty_times() -> None:
    rng = np.random.default_rng(0)
    called = 0
    for number in range(120):
        one, two = rng.normal(size=(2, 40)).tolist()
        called += paired_difference(one, two, ones(40), lower_is_better=True, stream=str(number)).verdict != "undecided"
    assert called <= 12  # 6 expected


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_score_that_is_no_number_decides_nothing(broken: float, lower_is_better: bool) -> None:
    usual = [1.0 + number / 10 for number in range(20)]
    with np.errstate(invalid="ignore"):
        made = paired_difference([broken, *usual[1:]], usual, ones(20), lower_is_better=lower_is_better, stream="t")
    assert (made.verdict, made.reason) == ("undecided", "a score is no finite number")
