"""The report of `finemoe analyze load`: what it says, and what its charts hold."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.load.figures import (
    domain_maps,
    evenness,
    figures,
    frames_of,
    heat_map,
    lift_maps,
    over_training,
    thinned,
)
from finemoe.charts.load.page import load_page
from finemoe.charts.load.words import summary


def layer(rng: random.Random, experts: int, domains: tuple[str, ...]) -> dict[str, Any]:
    def counted() -> dict[str, Any]:
        counts = [rng.randrange(1, 200) for _ in range(experts)]
        return {
            "load": counts, "max_vio": max(counts) * experts / sum(counts) - 1, "entropy": 0.93,
            "effective_experts": 5.5, "variation": 0.4, "dead": 0, "starved": 1,
        }  # fmt: skip

    by_domain = {domain: counted() for domain in domains}
    pairs = [{"a": 1, "b": 2, "count": 40, "lift": 2.5}]
    return counted() | {
        "experts": experts, "experts_per_token": 2, "max_vio_batch": 1.5, "domains": by_domain, "pairs": pairs,
        "domain_pairs": dict.fromkeys(domains, pairs),
    }  # fmt: skip


def fake(
    moments: int = 3, layers: int = 2, experts: int = 8, domains: tuple[str, ...] = ("prose", "code"), recorded: int = 0
) -> dict[str, Any]:
    rng = random.Random(0)

    def one(step: int) -> dict[str, Any]:
        made = {str(number): layer(rng, experts, domains) for number in range(1, layers + 1)}
        return {
            "name": f"step {step}", "path": f"runs/x/step-{step}", "step": step, "loss": dict.fromkeys(domains, 2.0),
            "layers": made, "max_vio": 0.9, "max_vio_batch": 1.4, "entropy": 0.93, "variation": 0.4, "dead": 0,
            "starved": 2, "experts": layers * experts, "alerts": [], "enough": True,
        }  # fmt: skip

    matrix = [[None if a == b else 0.0 if a + b == 1 else 1.0 + a + b for b in range(experts)] for a in range(experts)]
    return {
        "kind": "load", "schema": 1, "date": "2026-01-02T03:04:05+00:00", "command": "finemoe analyze load runs/x",
        "finemoe_version": "0.1.0", "machine": {"cores": 2, "packages": {"torch": "2"}},
        "text": {"tokens": dict.fromkeys(domains, 1000), "length": 16, "tokens_per_batch": 128},
        "series": [one(10 * number) for number in range(1, moments + 1)],
        "lift": {str(number): matrix for number in range(1, layers + 1)},
        "history": [{"step": 5 * n, "layers": one(n)["layers"]} for n in range(1, recorded + 1)],
        "alerts_in_training": [],
    }  # fmt: skip


def data(chart: Any) -> list[dict[str, Any]]:
    spec = theme.spec(chart)
    return list(spec["datasets"][spec["data"]["name"]])


def test_the_heat_map_shows_load_relative_to_an_even_share():
    results = fake()
    frames = frames_of(results)
    rows = data(heat_map(results, frames, slider=True))
    assert len(rows) == 3 * 2 * 8
    for row in rows:
        counts = frames[row["frame"]]["layers"][str(row["layer"])]["load"]
        assert row["relative"] == pytest.approx(8 * counts[row["expert"]] / sum(counts), abs=1e-3)
        assert row["share"] == pytest.approx(counts[row["expert"]] / sum(counts), abs=1e-5)


def test_the_slider_reaches_every_moment_and_names_it():
    spec = theme.spec(heat_map(fake(), frames_of(fake()), slider=True))
    (param,) = spec["params"]
    assert (param["bind"]["min"], param["bind"]["max"], param["value"]) == (0, 2, 2)
    assert spec["title"]["text"]["expr"] == "['step 10', 'step 20', 'step 30'][frame]"


def test_a_single_model_needs_no_slider_and_no_curves():
    results = fake(moments=1)
    assert "params" not in theme.spec(heat_map(results, frames_of(results), slider=True))
    assert over_training(results) == evenness(results) == []


def test_what_a_run_recorded_makes_a_movie_of_a_single_model():
    results = fake(moments=1, recorded=4)
    assert [frame["step"] for frame in frames_of(results)] == [5, 10, 15, 20, 10]
    assert len({row["step"] for row in data(over_training(results)[0])}) == 4
    assert len(over_training(results)) == 2
    assert len(evenness(results)) == 3


def test_models_of_several_trainings_are_no_curve():
    results = fake(moments=4)
    results["series"][1]["step"] = 40  # as if of another run
    assert over_training(results) == evenness(results) == []
    assert len(data(heat_map(results, frames_of(results), slider=True))) == 4 * 2 * 8
    results = fake(moments=4)
    results["series"][0]["layers"].pop("2")
    assert over_training(results) == evenness(results) == []
    assert "Over training" not in load_page(results)


def test_frames_of_a_large_model_are_thinned_and_keep_the_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finemoe.charts.load.figures._MOST_CELLS", 3 * 16)
    results = fake(moments=9)
    rows = data(heat_map(results, frames_of(results), slider=True))
    assert {row["frame"] for row in rows} == {0, 1, 2}
    assert thinned(range(9), 3) == [0, 4, 8]
    assert thinned(range(9), 1) == [8]


def test_names_cannot_break_out_of_the_title():
    results = fake()
    results["series"][0]["name"] = "a'] + alert(1) + ['"
    spec = theme.spec(heat_map(results, frames_of(results), slider=True))
    assert spec["title"]["text"]["expr"].startswith("['a�� � alert�1� � ��', ")


def test_domains_lie_below_each_other_and_one_domain_needs_no_map():
    charts = domain_maps(fake())
    assert len(charts) == 2
    assert {row["domain"] for row in data(charts[0])} == {"prose", "code"}
    assert domain_maps(fake(domains=("prose",))) == []


def test_lift_is_drawn_on_a_logarithm_and_never_together_has_the_last_colour():
    rows = {(row["a"], row["b"]): row["log"] for row in data(lift_maps(fake())[0])}
    assert rows[(0, 1)] == -2
    assert rows[(1, 2)] == pytest.approx(2)
    assert (3, 3) not in rows


def test_a_deep_model_gets_a_dozen_charts():
    assert len(domain_maps(fake(layers=30))) == 12


def test_the_page_has_every_part():
    page = load_page(fake(recorded=5))
    for words in (
        "Over training",
        "By domain",
        "Chosen together",
        "What the words mean",
        "1 and 2",
        "Nothing to worry",
    ):
        assert words in page
    assert "finemoe analyze load runs/x" in page
    shown = re.search(r'id="chart-data">(.*?)</script>', page, re.DOTALL)
    assert shown is not None
    assert len(json.loads(shown[1])["charts"]) == 1 + 3 + 2 + 2 + 2
    assert 'role="alert"' not in page


def test_alerts_stand_above_everything():
    results = fake()
    results["series"][-1]["alerts"] = [{"layer": 1, "level": "collapsed", "message": "layer 1, collapsed: <b>"}]
    results["alerts_in_training"] = [{"step": 70, "layer": 1, "level": "uneven", "message": "layer 1, uneven"}]
    page = load_page(results)
    assert "1 of 2 layers do not use their experts" in page
    assert "layer 1, collapsed: &lt;b&gt;" in page
    assert "Step 70: layer 1, uneven" in page
    assert "Nothing to worry about" not in " ".join(summary(results))


def test_little_text_says_nothing_about_collapse():
    results = fake()
    results["series"][-1]["enough"] = False
    said = " ".join(summary(results))
    assert "Too little text" in said
    assert "Nothing to worry about" not in said


def test_a_model_whose_tokens_have_one_expert_has_no_pairs():
    results = fake()
    results["lift"] = {}
    for one in results["series"]:
        for found in one["layers"].values():
            found["pairs"], found["domain_pairs"] = [], {}
    assert "Chosen together" not in load_page(results)


def test_every_figure_is_written(tmp_path: Path):
    paths = theme.save(figures(fake()), tmp_path)
    names = {"load", "load_over_training", "evenness", "domains", "together"}
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert all(path.stat().st_size > 1000 for path in paths)
