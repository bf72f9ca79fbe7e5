"""The pages of knock-outs and of relevance: they draw, say what the records say, and bear what is missing."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.knockout.figures import (
    curves,
    domain_curves,
    expert_map,
    expert_maps_by_domain,
    figures,
    layer_dots,
    pair_maps,
    shared_dots,
)
from finemoe.charts.knockout.page import knockout_page
from finemoe.charts.knockout.words import by_size, change, signed, verdict
from finemoe.charts.relevance.figures import relevance_chart
from finemoe.charts.relevance.page import relevance_page

DOMAINS = ("prose", "code <b>")
HEAD: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "finemoe_version": "0.1.0",
    "command": "finemoe analyze knockout runs/x",
    "machine": {"processor": "a processor", "cores": 2, "packages": {"torch": "2"}},
    "model": {"source": "runs/x"},
    "text": {"length": 64, "domains": {name: {"windows": 4, "tokens": 250} for name in DOMAINS}},
}
PAPER = {
    "source": "the paper",
    "masked": {
        "DeepSeekMoE": {"0": 1.808, "1": 7.468, "4": 9.071},
        "GShard×1.5": {"0": 1.808, "1": 5.586, "4": 7.721},
    },
    "active": {"3": 1.956, "7": 1.808},
    "active_gshard": 1.867,
    "shared": {"intact": 1.808, "replaced": 2.414},
}


def effect(mean: float | None, half: float | None = 0.01) -> dict[str, float | None]:
    if mean is None or half is None:
        return {"mean": mean, "low": None, "high": None}
    return {"mean": mean, "low": mean - half, "high": mean + half}


def record(label: str, rise: float | None, half: float | None = 0.01, **about: Any) -> dict[str, Any]:
    loss = effect(None if rise is None else 4 + rise, half)
    losses = {"loss": loss, "difference": effect(rise, half)}
    return {
        "label": label,
        **about,
        "constraint": {"layers": [0]},
        **losses,
        "by_domain": {name: copy.deepcopy(losses) for name in DOMAINS},
        "windows_run": 3,
    }


def made(records: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"records": records, "notes": [], "work": {"blocks_run": 60, "blocks_plain": 100}, **more}


@pytest.fixture
def results() -> dict[str, Any]:
    masked = [record(f"top {n}/16 left out ({n} of 16)", 0.1 * n, fraction=n / 16) for n in (1, 4)]
    active = [record(f"{n} active", 0.02 * (7 - n), count=n) for n in (3, 5)]
    experts = [
        record(f"layer {layer}, expert {e} out", 0.001 * e - 0.002, 0.0005, layer=layer, expert=e, share=0.25)
        for layer in (1, 2)
        for e in range(5)
    ]
    pairs = [
        record("pair", 0.02, layer=1, experts=[a, b]) | {"interaction": effect(mean)}
        for a, b, mean in ((0, 1, 0.05), (0, 2, 0.001), (1, 2, -0.07))
    ]
    layers = [record(f"layer 1, {part} out", 0.3, layer=1, part=part) for part in ("routed", "shared", "both")]
    shared = [record("shared", 0.2, replaced=True), record("shared out", 0.3, replaced=False)]
    intact = {
        "loss": effect(4.0),
        "by_domain": {name: {"loss": effect(4.0), "windows": 4, "tokens": 250} for name in DOMAINS},
    }
    return {
        **HEAD,
        "experiments": {
            "masked": made(masked),
            "shared": made(shared),
            "active": made(active, trained=7),
            "experts": made(experts),
            "pairs": made(pairs),
            "layers": made(layers),
        },
        "skipped": {},
        "intact": intact,
        "complete": True,
        "paper": PAPER,
    }


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", " ", page))


def test_page_says_what_was_found_beside_the_paper(results: dict[str, Any]) -> None:
    text = " ".join(text_of(knockout_page(results)).split())
    assert "intact model has a loss of 4.000 nats per token" in text
    assert "top 1/16 left out (1 of 16): loss rises by +0.100 (+0.090 to +0.110); in the paper by +5.66" in text
    assert "+7.263" in text  # 9.071 - 1.808
    assert "replaced by routed ones, loss rises by +0.200 (+0.190 to +0.210); in the paper by +0.606" in text
    assert "+0.148" in text  # 1.956 - 1.808
    assert "4 of 10 single experts have an interval above 0" in text
    assert "Of 3 tested pairs 1 have an interaction above 0" in text
    assert "and 1 below 0" in text
    assert "360 of the 600 block passes" in text


def test_text_from_outside_is_escaped(results: dict[str, Any]) -> None:
    page = knockout_page(results)
    assert "code &lt;b&gt;" in page
    assert "code <b>" not in page


def test_incomplete_results_say_so(results: dict[str, Any]) -> None:
    assert "incomplete" not in knockout_page(results)
    assert "incomplete" in knockout_page(results | {"complete": False})


@pytest.mark.parametrize("only", ["masked", "experts", "pairs"])
def test_each_experiment_stands_alone(results: dict[str, Any], only: str) -> None:
    results["experiments"] = {only: results["experiments"][only]}
    results["skipped"] = {"other": "there is no reason"}
    page = knockout_page(results)
    assert "Not run: other: there is no reason" in page
    assert page.count("<section") == 3  # summary, the one, how
    assert figures(results)


def test_no_interval_and_no_domain_are_borne(results: dict[str, Any]) -> None:
    for each in results["experiments"].values():
        for one in each["records"]:
            for losses in (one, *one["by_domain"].values()):
                losses["difference"] = effect(losses["difference"]["mean"], None)
            one["by_domain"] = {"prose": one["by_domain"]["prose"]}
            if "interaction" in one:
                one["interaction"] = effect(math.nan)
    text = text_of(knockout_page(results))
    assert "nan" not in text.lower().replace("nano", "")
    assert set(figures(results)) == {"masked", "active", "shared", "experts", "usage", "pairs", "layers"}


def test_every_figure_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    made = figures(results)
    assert set(made) == {
        "masked", "masked_domains", "active", "active_domains", "shared", "experts", "usage", "pairs", "layers",
    }  # fmt: skip
    few = {name: made[name] for name in ("masked", "experts", "pairs", "layers")}
    for path in theme.save(few, tmp_path, "dark"):
        assert path.stat().st_size > 1000
    assert "nats per token" in (tmp_path / "masked.svg").read_text()


def values(chart: Any) -> list[dict[str, Any]]:
    """All records that a chart draws, once each."""
    spec = theme.spec(chart)
    found = [row for rows in spec.get("datasets", {}).values() for row in rows]
    for part in (spec, *spec.get("layer", ())):
        found += part.get("data", {}).get("values", ())
    return found


def test_curves_are_rises_over_the_intact_model(results: dict[str, Any]) -> None:
    ours, paper = curves(results, "masked")
    assert {(row["x"], round(row["rise"], 6)) for row in values(ours)} == {(0, 0.0), (1, 0.1), (4, 0.4)}
    printed = {(row["series"], row["x"]): row["rise"] for row in values(paper)}
    assert printed["DeepSeekMoE", 1] == pytest.approx(5.66)
    assert printed["GShard×1.5", 4] == pytest.approx(5.913)
    ours, paper = curves(results, "active")
    assert {row["x"] for row in values(ours)} == {3, 5}
    assert {round(row["rise"], 3) for row in values(paper)} == {0.148, 0.0}


def test_small_multiples_share_one_scale(results: dict[str, Any]) -> None:
    panels = domain_curves(results, "masked")
    assert [panel.title for panel in panels] == list(DOMAINS)
    scales = {
        json.dumps(re.findall(r'"domain": \[[^]]*\]', json.dumps(theme.spec(panel)["layer"][0]["encoding"]["y"])))
        for panel in panels
    }
    assert len(scales) == 1
    assert "domain" in scales.pop()


def test_colours_of_maps_are_even_on_both_sides_of_zero(results: dict[str, Any]) -> None:
    results["experiments"]["experts"]["records"][0]["difference"]["mean"] = 5.0  # one that would flatten the rest
    results["experiments"]["experts"]["records"] *= 6
    scale = theme.spec(expert_map(results))["encoding"]["color"]["scale"]
    low, high = scale["domain"]
    assert low == -high
    assert scale["clamp"]
    assert scale["domainMid"] == 0


def test_maps_of_domains_share_a_scale_that_reaches_what_domains_have(results: dict[str, Any]) -> None:
    """A rise of one domain is a part of it in all of them: the overall map's colours would end too soon."""
    for number, one in enumerate(results["experiments"]["experts"]["records"]):
        for each in one["by_domain"].values():
            each["difference"]["mean"] = 2.0 + 0.1 * number
    maps = expert_maps_by_domain(results)
    ends = {theme.spec(chart)["encoding"]["color"]["scale"]["domain"][1] for chart in maps}
    assert len(ends) == 1
    assert ends.pop() >= 2.0


def test_matrix_of_pairs_is_symmetric_and_marks_what_is_sure(results: dict[str, Any]) -> None:
    rows = {(row["a"], row["b"]): row for row in values(pair_maps(results)[0])}
    assert len(rows) == 6
    assert all(rows[a, b]["value"] == rows[b, a]["value"] for a, b in rows)
    assert {pair for pair, row in rows.items() if row["certain"] == "decided"} == {(0, 1), (1, 0), (1, 2), (2, 1)}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.2, 0), (-0.2, -0.1, 0), (-0.1, 0.2, 1), (0.0, 0.2, 1), (None, None, 1), (math.nan, 1.0, 1)],
)
def test_what_an_interval_decides(low: float | None, high: float | None, word: int) -> None:
    assert theme.certain(low, high) == theme.CERTAIN[word]


def test_domains_are_folded_with_the_most_and_the_least_named(results: dict[str, Any]) -> None:
    page = text_of(knockout_page(results))
    assert "By domain: most in" in page
    folded = re.findall(r"<details>.*?</details>", knockout_page(results), flags=re.DOTALL)
    assert sum(part.count("data-chart") for part in folded) >= 4  # two domains of both curves


def test_charts_have_descriptions_and_units(results: dict[str, Any]) -> None:
    for chart in (*curves(results, "masked"), shared_dots(results), layer_dots(results)):
        spec = theme.spec(chart)
        assert "nats per token" in json.dumps(spec)
        assert spec["description"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "+0.100"), (-0.1, "−0.100"), (0.0001, "0.000"), (-0.0001, "0.000"), (0, "0.000")]
)
def test_signs(value: float, text: str) -> None:
    assert signed(value) == text


def test_changes_in_words() -> None:
    assert change(effect(0.1)) == "+0.100 (+0.090 to +0.110)"
    assert change(effect(0.1, None)) == "+0.100"
    assert change(effect(0.0, 0.0)) == "0"
    assert change(None) == change(effect(None)) == "–"


def test_verdicts_follow_the_interval() -> None:
    assert [verdict(effect(mean)) for mean in (0.02, -0.02, 0.005)] == ["redundant", "work together", "undecided"]
    assert verdict(effect(0.02, None)) == "undecided"


def test_order_is_by_effect_and_unknown_counts_as_nothing() -> None:
    found = [record("a", -1.0), record("b", None), record("c", 2.0)]
    assert [one["label"] for one in by_size(found)] == ["c", "b", "a"]


# ---- relevance ----


def relevance_results() -> dict[str, Any]:
    selection = {
        "score": "gate",
        "p": 0.5,
        "trainable_parameters": 12_000,
        "trainable_share": 0.031,
        "layers": [
            {"layer": 1, "experts": [3], "scores": [0.5]},
            {"layer": 2, "experts": [0, 2], "scores": [0.4, 0.3]},
        ],
    }
    cumulative = {"1": [0.5, 0.8, 1.0], "2": [0.4, 0.7, 1.0]}
    return {**HEAD, "samples": 8, "tokens": 500, "cumulative": cumulative, "selection": selection}


def test_relevance_page_names_the_selected() -> None:
    text = " ".join(text_of(relevance_page(relevance_results())).split())
    assert "12.0K parameters in them would be trained, 3.10 % of the model" in text
    assert "2 2 70.0 % 0, 2" in text


def test_relevance_bars_add_up_and_tell_the_selected() -> None:
    rows = [row for row in values(relevance_chart(relevance_results())) if "kind" in row]
    assert [(row["low"], row["high"], row["kind"]) for row in rows if row["layer"] == 2] == [
        (0, 40, "selected"), (40, 70, "selected"), (70, 100, "others"),
    ]  # fmt: skip
