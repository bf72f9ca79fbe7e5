"""What experts take, against plain loops over the assignments."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.analysis import specialization
from finemoe.analysis.specialization import (
    HighestGates,
    LayerTally,
    PairSums,
    domain_shares,
    mutual_information,
    overlap,
    token_lifts,
)

EXPERTS, VOCAB, K = 5, 7, 2


@st.composite
def routings(draw: st.DrawFn) -> Any:
    """Batches of (domain, tokens, experts [n, k], gates [n, k]); gates have few values, so that there are ties."""
    batches = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12))
        seed = draw(st.integers(0, 2**16))
        numbers = np.random.default_rng(seed)
        experts = np.stack([numbers.permutation(EXPERTS)[:K] for _ in range(size)])
        gates = numbers.integers(1, 6, (size, K)) / 8
        batches.append((draw(st.integers(0, 2)), numbers.integers(0, VOCAB, size), experts, gates))
    return batches


def tallied(batches: Any, contexts: int = 3) -> tuple[LayerTally, list[tuple[int, int, int, int, float]]]:
    """The tally, and every assignment as (place, domain, token, expert, gate)."""
    tally, flat, place = LayerTally(EXPERTS, 3, VOCAB, contexts), [], 0
    for domain, tokens, experts, gates in batches:
        tally.add(domain, tokens, np.arange(place, place + len(tokens)), experts, gates)
        for i, token in enumerate(tokens.tolist()):
            flat += [(place + i, domain, token, int(experts[i, j]), float(gates[i, j])) for j in range(K)]
        place += len(tokens)
    return tally, flat


@given(routings())
def test_counts_gates_and_joint_loads_are_those_of_a_loop(batches):
    tally, flat = tallied(batches)
    counts, gates, together = Counter(), defaultdict(float), Counter()
    chosen = defaultdict(list)
    for place, domain, _, expert, gate in flat:
        counts[domain, expert] += 1
        gates[expert] += gate
        chosen[place].append(expert)
    for taken in chosen.values():
        together.update((a, b) for a in taken for b in taken)
    for expert in range(EXPERTS):
        assert tally.gates[expert] == pytest.approx(gates[expert])
        assert [tally.counts[domain, expert] for domain in range(3)] == [counts[domain, expert] for domain in range(3)]
        assert [tally.joint[expert, other] for other in range(EXPERTS)] == [
            together[expert, other] for other in range(EXPERTS)
        ]


@given(routings(), st.sampled_from([1, 5, 1 << 20]))
def test_pairs_are_summed_whenever_they_are_put_together(batches, pending):
    _, flat = tallied(batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specialization, "_PENDING", pending)
        pairs = PairSums(VOCAB)
        for _, _, token, expert, gate in flat:
            pairs.add(np.array([expert]), np.array([token]), np.array([gate]))
        for expert in range(EXPERTS):
            expected: dict[int, list[float]] = {}
            for _, _, token, owner, gate in flat:
                if owner == expert:
                    found = expected.setdefault(token, [0, 0.0])
                    found[0] += 1
                    found[1] += gate
            tokens, counts, gates = pairs.of(expert)
            assert tokens.tolist() == sorted(expected)
            assert counts.tolist() == [expected[token][0] for token in sorted(expected)]
            assert gates.tolist() == pytest.approx([expected[token][1] for token in sorted(expected)])


@given(routings(), st.integers(1, 5))
def test_the_highest_gates_are_the_first_of_all_sorted(batches, most):
    tally, flat = tallied(batches, most)
    for expert in range(EXPERTS):
        order = sorted((-gate, place) for place, _, _, owner, gate in flat if owner == expert)[:most]
        kept = tally.highest.places[expert] >= 0
        assert tally.highest.places[expert][kept].tolist() == [place for _, place in order]
        assert tally.highest.gates[expert][kept].tolist() == [-gate for gate, _ in order]


def test_equal_gates_keep_the_earlier_place_also_across_batches():
    highest = HighestGates(1, 2)
    for places in ([3, 4], [5, 6]):
        highest.add(np.zeros(2, dtype=np.int64), np.ones(2), np.array(places))
    assert highest.places.tolist() == [[3, 4]]


@given(routings())
def test_token_lifts_are_those_of_a_loop(batches):
    tally, flat = tallied(batches)
    base = np.bincount(np.concatenate([tokens for _, tokens, _, _ in batches]), minlength=VOCAB)
    for expert in range(EXPERTS):
        mine = [(token, gate) for _, _, token, owner, gate in flat if owner == expert]
        total = sum(gate for _, gate in mine)
        expected = {}
        for token in range(VOCAB):
            taken = [gate for found, gate in mine if found == token]
            if len(taken) >= 5:
                expected[token] = (sum(taken) / total) / (base[token] / base.sum())
        lifts = token_lifts(tally, expert, base, VOCAB)
        assert {found.token: found.lift for found in lifts} == pytest.approx(expected)
        assert [found.lift for found in lifts] == sorted((found.lift for found in lifts), reverse=True)


def test_a_token_seen_once_is_not_ranked_though_its_lift_is_the_highest():
    tally = LayerTally(2, 1, 10, 1)
    tokens = np.array([0] * 6 + [1] * 6 + [2])
    experts = np.array([[0]] * 6 + [[1]] * 6 + [[0]])
    tally.add(0, tokens, np.arange(13), experts, np.ones((13, 1)))
    base = np.bincount(tokens, minlength=10)
    assert [found.token for found in token_lifts(tally, 0, base, 5)] == [0]
    assert token_lifts(tally, 0, base, 5)[0].lift == pytest.approx((6 / 7) / (6 / 13))


def test_a_rare_token_of_a_busy_expert_must_make_up_its_share():
    tally = LayerTally(1, 1, 4, 1)
    tokens = np.array([0] * 4990 + [1] * 5 + [2] * 10)
    tally.add(0, tokens, np.arange(5005), np.zeros((5005, 1), dtype=np.int64), np.ones((5005, 1)))
    found = token_lifts(tally, 0, np.bincount(tokens, minlength=4), 5)
    assert {each.token for each in found} == {0}  # 10 of 5005 are 0.1998 %


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4),
    st.lists(st.integers(1, 30), min_size=4, max_size=4),
)
def test_domain_shares_are_those_of_a_loop(table, sizes):
    counts, tokens = np.array(table), np.array(sizes[: len(table)])
    found = domain_shares(counts, tokens)
    for expert in range(3):
        load = sum(row[expert] for row in table)
        rates = [row[expert] / size for row, size in zip(table, sizes, strict=False)]
        if not load:
            assert math.isnan(found.specialization[expert])
            assert math.isnan(found.divergence[expert])
            continue
        entropy = -sum(rate / sum(rates) * math.log(rate / sum(rates)) for rate in rates if rate)
        divergence = sum(
            row[expert] / load * math.log2(row[expert] / load / (size / tokens.sum()))
            for row, size in zip(table, sizes, strict=False)
            if row[expert]
        )
        assert found.specialization[expert] == pytest.approx(1 - entropy / math.log(len(table)), abs=1e-9)
        assert found.divergence[expert] == pytest.approx(divergence, abs=1e-9)
        assert found.rate[:, expert].tolist() == pytest.approx(rates)
        lifts = [row[expert] / load / (size / tokens.sum()) for row, size in zip(table, sizes, strict=False)]
        assert found.lift[:, expert].tolist() == pytest.approx(lifts)


def test_specialisation_does_not_depend_on_how_much_of_a_domain_is_read():
    one = domain_shares(np.array([[10, 5], [2, 8]]), np.array([100, 100]))
    more = domain_shares(np.array([[100, 50], [2, 8]]), np.array([1000, 100]))
    assert one.specialization.tolist() == pytest.approx(more.specialization.tolist())
    assert domain_shares(np.array([[7, 3], [0, 3]]), np.array([50, 50])).specialization.tolist() == [1.0, 0.0]


def test_of_one_domain_there_is_no_specialisation():
    assert math.isnan(domain_shares(np.array([[3, 4]]), np.array([7])).score)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4))
def test_mutual_information_is_that_of_a_loop(table):
    counts = np.array(table)
    total = counts.sum()
    bits, chance = mutual_information(counts)
    if not total:
        assert math.isnan(bits)
        return
    expected = 0.0
    for row in table:
        for expert, count in enumerate(row):
            if count:
                column = sum(other[expert] for other in table)
                expected += count / total * math.log2(count * total / (sum(row) * column))
    assert bits == pytest.approx(expected, abs=1e-9)
    used = sum(any(row[expert] for row in table) for expert in range(3))
    filled = sum(any(row) for row in table)
    assert chance == pytest.approx((used - 1) * (filled - 1) / (2 * total * math.log(2)))


def test_chance_is_what_unrelated_choices_show():
    numbers = np.random.default_rng(0)
    shown = []
    for _ in range(200):
        pairs = numbers.integers(0, 4, 500) * 6 + numbers.integers(0, 6, 500)
        shown.append(mutual_information(np.bincount(pairs, minlength=24).reshape(4, 6)))
    assert np.mean([bits for bits, _ in shown]) == pytest.approx(shown[0][1], rel=0.1)


@given(st.integers(0, 2**16), st.integers(1, 20))
def test_overlap_is_that_of_sets(seed, size):
    numbers = np.random.default_rng(seed)
    first, second = (np.stack([numbers.permutation(EXPERTS)[:K] for _ in range(size)]) for _ in range(2))
    found = overlap(first, second, EXPERTS)
    for expert in range(EXPERTS):
        a, b = ({i for i, row in enumerate(choice.tolist()) if expert in row} for choice in (first, second))
        expected = len(a & b) / len(a | b) if a | b else math.nan
        assert found[expert] == pytest.approx(expected, nan_ok=True)
