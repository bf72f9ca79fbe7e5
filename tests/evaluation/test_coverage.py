"""How often two equal models are called different, and how often an interval holds: counted over simulated items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from finemoe.core.statistics import ratio, ratios
from finemoe.evaluation import metrics
from finemoe.evaluation.metrics import FEWEST, estimate, paired_difference

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

WEIGHTS: dict[str, Draw] = {
    "equal": lambda rng, n: np.ones(n),
    "skewed": lambda rng, n: np.exp(rng.normal(size=n)),
    "one heavy": lambda rng, n: np.where(np.arange(n) == 0, 3.0 * n, 1.0),
}
DIFFERENCES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
    "long tails": lambda rng, n: np.exp(rng.normal(size=n)) - np.exp(rng.normal(size=n)),
}
MOST = {"normal": 0.05, "skewed": 0.10, "long tails": 0.05}
"""Shares of equal models called different that are put up with. Of a dozen skewed differences nothing tells more."""


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 400)


def called(n: int, weights: Draw, differences: Draw, runs: int) -> float:
    rng = np.random.default_rng([n, runs])
    decided = 0
    for number in range(runs):
        first, weight = differences(rng, n), weights(rng, n)
        made = paired_difference(first.tolist(), [0.0] * n, weight.tolist(), lower_is_better=True, stream=str(number))
        decided += made.verdict != "undecided"
    return decided / runs


@pytest.mark.parametrize("n", [10, 12, 20, 50, 100])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("differences", DIFFERENCES)
def test_equal_models_are_rarely_called_different(n: int, weights: str, differences: str) -> None:
    runs = 300
    share = called(n, WEIGHTS[weights], DIFFERENCES[differences], runs)
    most = MOST[differences]
    assert share <= most + 2.6 * (most * (1 - most) / runs) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_fewer_than_ten_items_decide_nothing(n: int) -> None:
    for second in ([0.0] * n, [number / 100 for number in range(n)]):  # right or wrong, and not
        made = paired_difference([1.0] * n, second, [1.0] * n, lower_is_better=False, stream="t")
        assert made.verdict == "undecided"
        assert "fewer than 10 decide nothing" in made.reason


def test_one_heavy_item_among_light_ones_is_no_crowd() -> None:
    n = 100
    first = np.random.default_rng(0).normal(1.0, 0.1, n).tolist()
    weights = [1000.0, *[1.0] * (n - 1)]
    made = paired_difference(first, [0.0] * n, weights, lower_is_better=True, stream="t")
    assert made.verdict == "undecided"
    assert "100 items tell as much as 1.2 of equal weight" in made.reason
    assert paired_difference(first, [0.0] * n, [1.0] * n, lower_is_better=True, stream="t").verdict == "worse"


@pytest.mark.parametrize("n", [FEWEST, 14, 30])
def test_what_differs_is_still_found(n: int) -> None:
    rng = np.random.default_rng(n)
    found = 0
    for number in range(100):
        first = rng.normal(-1.5, 1.0, n).tolist()
        made = paired_difference(first, [0.0] * n, [1.0] * n, lower_is_better=True, stream=str(number))
        assert made.verdict != "worse"
        assert (made.reason == "") == (made.verdict == "better")
        if made.verdict == "better":
            assert made.high is not None
            assert made.high < 0
        found += made.verdict == "better"
    assert found >= 90


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("weights", ["equal", "skewed"])
def test_intervals_of_scores_hold_at_any_number_of_items(n: int, weights: str) -> None:
    rng, held, runs = np.random.default_rng(n), 0, 300
    for number in range(runs):
        made = estimate((2 + rng.normal(size=n)).tolist(), WEIGHTS[weights](rng, n).tolist(), str(number))
        assert made.low is not None
        assert made.high is not None
        held += made.low <= 2 <= made.high
    assert held / runs >= 0.95 - 2.6 * (0.05 * 0.95 / runs) ** 0.5


def test_equal_weights_give_students_interval_and_weights_that_of_leaving_one_out() -> None:
    values = np.random.default_rng(5).normal(size=9)
    spread = ratio(values)
    assert (spread.error, spread.freedom) == (pytest.approx(stats.sem(values)), pytest.approx(8))
    assert spread.p_value() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    weights = np.random.default_rng(6).exponential(size=9)
    spread = ratio(values, weights)
    without = np.array([np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(9)])
    assert spread.error == pytest.approx((((without - spread.value) ** 2).sum() * 8 / 9) ** 0.5)
    assert ratio([1.0, 7.0], [1.0, 0.0]).error is None
    many = ratios(np.stack([values, values + 1]), np.stack([weights, weights]))
    assert many[1] == pytest.approx([spread.error, spread.error])
