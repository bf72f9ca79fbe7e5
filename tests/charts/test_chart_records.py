"""The arithmetic under the charts, and what keeps their colours legible."""

from __future__ import annotations

import itertools
import math

import pytest
from fake_results import fake_results

from finemoe.charts import theme
from finemoe.charts.comparison.records import (
    above_window,
    curve,
    load_records,
    loss_window,
    mean_curves,
    paper_differences,
    shown_max_vio,
    spread,
    unit_for,
    visible,
)
from finemoe.charts.comparison.words import arm_names, pair_sentence, summary
from finemoe.charts.numbers import clean, count, duration, percent, plus_minus, scientific


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (850, "850"),
        (9_996, "10.0K"),
        (12_440, "12.4K"),
        (999_900, "1.00M"),
        (1.97e9, "1.97B"),
        (math.nan, "–"),
    ],
)
def test_counts_have_three_digits(value, shown):
    assert count(value) == shown


def test_other_numbers():
    assert scientific(4.333e15) == "4.33e15"
    assert [duration(s) for s in (3.21, 59.6, 200, 7500, None)] == [
        "3.2 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
        "–",
    ]
    assert [percent(p) for p in (0.42, -1.24, -0.01)] == ["+0.4 %", "−1.2 %", "0.0 %"]
    assert plus_minus({"mean": 1.808, "low": 1.805, "high": 1.811}) == "1.808 ± 0.003"
    assert plus_minus({"mean": 1.808, "low": None, "high": None}) == "1.808"
    assert clean({"a": (1.0, math.nan, [math.inf])}) == {"a": [1.0, None, [None]]}


def test_labels_keep_their_order_and_distance():
    places = spread([1.0, 1.01, 1.02, 3.0], gap=0.1, window=(0.0, 4.0))
    assert all(b - a >= 0.1 - 1e-12 for a, b in itertools.pairwise(places))
    assert sum(places[:3]) / 3 == pytest.approx(1.01)
    assert places[3] == 3.0
    low = spread([0.0, 0.0, 0.0], gap=0.1, window=(0.0, 4.0))
    assert sorted(low) == pytest.approx([0.0, 0.1, 0.2])
    high = spread([4.0, 4.0], gap=0.1, window=(0.0, 4.0))
    assert sorted(high) == pytest.approx([3.9, 4.0])


def test_a_mean_only_where_every_seed_has_a_loss():
    points = [
        {"seed": seed, "step": step, "tokens": 10 * step, "validation_loss": 5.0 - step + seed}
        for seed in (0, 1)
        for step in (0, 1, 2)
    ]
    points[-1]["validation_loss"] = math.nan
    rows = curve({"curve": points}, "tokens")
    assert [(row["x"], row["loss"], row["low"], row["high"]) for row in rows] == [(0, 5.5, 5, 6), (10, 4.5, 4, 5)]


def test_the_window_drops_the_first_fall_and_one_divergence():
    results = fake_results()
    window = loss_window(mean_curves(results, "tokens"))
    assert window is not None
    assert window[0] < 1.85
    assert 2.1 < window[1] < 3.0
    for point in results["arms"]["switch"]["curve"]:
        point["validation_loss"] += point["step"]
    curves = mean_curves(results, "tokens")
    bent = loss_window(curves)
    assert bent is not None
    assert bent[1] < 5
    assert above_window(curves) == ["Switch"]


def test_a_still_picture_starts_one_point_above_its_frame():
    rows = [{"low": low} for low in (9.0, 5.0, 3.0, 2.0, 2.5)]
    assert [row["low"] for row in visible(rows, (1.0, 4.0))] == [5.0, 3.0, 2.0, 2.5]
    assert visible(rows, (0.0, 1.0)) == rows[-2:]


def test_units_keep_ticks_short():
    assert unit_for(3.2e7, "tokens") == (1e6, "millions")
    assert unit_for(4.9e16, "flops") == (1e15, "1e15 FLOPs")
    assert unit_for(90, "seconds") == (1, "seconds")
    assert unit_for(1200, "seconds") == (60, "minutes")


def test_paper_differences_use_dense_and_the_pair_the_right_way_round():
    results = fake_results()
    baseline, rows = paper_differences(results)
    assert baseline == "Dense"
    ours = {row["arm"]: row for row in rows}
    assert ours["DeepSeekMoE"]["paper"] == pytest.approx(-0.252)
    assert all(row["low"] < row["ours"] < row["high"] < 0 for row in rows)


def test_relative_load():
    load = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    assert [row["relative"] for row in load_records(load)][:4] == [2.0, 1.0, 1.0, 0.0]


def test_the_max_vio_beside_the_load_is_that_of_the_same_validation():
    points = [{"seed": 3, "max_vio": 0.9}, {"seed": 3, "max_vio": 0.5}, {"seed": 4, "max_vio": 0.1}]
    assert shown_max_vio({"curve": points}) == 0.5
    assert shown_max_vio({"curve": [{"seed": 3}]}) is None  # dense
    assert shown_max_vio({}) is None


def test_names_are_unique_and_short():
    results = fake_results()
    for record in results["arms"].values():
        record["label"] = "one very long label that every arm shares"
    names = list(arm_names(results).values())
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 20


def test_sentences_take_the_winners_side():
    names = {"x": "X", "y": "Y"}
    pair = {"a": "x", "b": "y", "difference": 0.2, "low": 0.1, "high": 0.3, "verdict": "worse", "reason": ""}
    assert pair_sentence(pair, names) == "Y is better than X by 0.200 (0.100 to 0.300)."
    mirrored = {"a": "y", "b": "x", "difference": -0.2, "low": -0.3, "high": -0.1, "verdict": "better", "reason": ""}
    assert pair_sentence(mirrored, names) == pair_sentence(pair, names)
    assert (
        pair_sentence(pair | {"verdict": "undecided", "reason": "one seed"}, names)
        == "X and Y are undecided: one seed."
    )


def test_the_summary_never_claims_an_undecided_lead():
    text = " ".join(summary(fake_results(seeds=1)))
    assert "is better than" not in text
    assert "Undecided against" in text


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_stands_out_from_its_paper(scheme):
    for color in theme.PALETTES[scheme]:
        lighter, darker = sorted((luminance(color), luminance(theme.PAPERS[scheme])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 2.98, color  # WCAG 1.4.11 asks graphics for 3:1


def test_no_two_of_sixteen_arms_look_alike():
    colors = [theme.PALETTES["light"][i % len(theme.PALETTES["light"])] for i in range(16)]
    dashes = [tuple(dash) for dash in theme.arm_dashes(16)]
    assert len(set(zip(colors, dashes, strict=True))) == 16
    assert len(set(zip(colors, theme.arm_shapes(16), strict=True))) == 16


@pytest.mark.parametrize(
    ("experts", "every", "labels"), [(8, 1, 8), (17, 1, 17), (18, 2, 9), (64, 4, 16), (160, 16, 10)]
)
def test_at_most_seventeen_experts_have_a_label(experts, every, labels):
    assert theme.expert_ticks(experts) == list(range(0, experts, every))
    assert len(theme.expert_ticks(experts)) == labels <= 17


def test_a_decided_pair_has_a_filled_marker():
    import altair as alt

    x, y = alt.X("value:Q"), alt.Y("row:N")
    marks = theme.base([{"row": "a", "value": 1, "decided": "decided"}])
    made = [theme.spec(dots) for dots in theme.decided_dots(marks, x, y)]
    filled = {one["transform"][0]["filter"]: one["mark"]["filled"] for one in made}
    assert filled == {"datum.decided === 'decided'": True, "datum.decided === 'undecided'": False}
