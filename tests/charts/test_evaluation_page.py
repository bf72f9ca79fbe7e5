"""The report of an evaluation: everything told, nothing trusted."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from finemoe.charts.evaluation.figures import difference_chart, figures
from finemoe.charts.evaluation.page import evaluation_page
from finemoe.charts.evaluation.words import difference_text, interval_text, p_text, score_text, short_duration
from finemoe.charts.theme import spec

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def estimate(value: float, error: float = 0.04, n: int = 100) -> dict[str, Any]:
    low, high = value - 2 * error, value + 2 * error
    return {"value": value, "n": n, "standard_error": error, "low": low, "high": high, "method": "binomial"}


def scores(metric: str, value: float, groups: int = 0, **more: Any) -> dict[str, Any]:
    made = {
        "metric": metric, "value": value, "metrics": {metric: estimate(value)},
        "groups": {f"subject {i}": estimate(value) for i in range(groups)},
        "macro": estimate(value) if groups else None, "n": 100, "asked": 101, "skipped": 3, "truncated": 7,
        "unfinished": 0, "outcomes": {"answered": 100, "error": 1}, "notes": ["item-9: error: it broke"],
        "tokens": 5000, "seconds": 12.5, "tokens_per_second": 400.0, "reused_answers": 0,
    }  # fmt: skip
    return {**made, **more}


def fake() -> dict[str, Any]:
    about = {
        "chance": 0.25,
        "lower_is_better": False,
        "shots": 5,
        "shots_most": 5,
        "shots_wanted": 5,
        "prompts": "abc",
        "items": 101,
    }
    model = {
        "path": "runs/x", "fingerprint": "f00", "parameters": 1000, "dtype": "float32", "device": "cpu", "reach": 64,
        "first_token": 0, "batch_invariant": True,
    }  # fmt: skip
    pair = {"task": "mmlu", "metric": "accuracy", "a": "one", "b": "two", "value": 0.1, "n": 100, "test": "mcnemar"}
    pair |= {"standard_error": 0.02, "low": 0.06, "high": 0.14, "verdict": "better", "p_value": 1e-5}
    return {
        "schema": 1, "version": "0.1.0", "date": "2026-01-02T03:04:05+00:00", "command": "finemoe evaluate runs/x",
        "settings": {"batch": 16, "limit": 9, "shots": None, "seed": 0, "sampling": {}, "sandbox": {"network": "off"}},
        "machine": {"processor": "abacus"}, "models": {"one": model, "two": model},
        "tasks": {
            "mmlu": {"title": "MMLU", "metric": "accuracy", **about},
            "text": {"title": "Text", "metric": "bits_per_byte", **about, "chance": None, "lower_is_better": True},
        },
        "scores": {
            "one": {"mmlu": scores("accuracy", 0.4, groups=3), "text": scores("bits_per_byte", 1.1)},
            "two": {"mmlu": scores("accuracy", 0.3, groups=20), "text": scores("bits_per_byte", 1.2)},
        },
        "differences": [pair],
    }  # fmt: skip


def test_every_part_is_there() -> None:
    page = evaluation_page(fake())
    for heading in ("Summary", "Scores", "Model against model", "By group", "What was left out", "How it was made"):
        assert re.search(rf"<h2[^>]*>\s*{heading}\s*</h2>", page), heading
    for said in (
        "40.0 ± 4.0 %",
        "above guessing (25.0 %)",
        "one is better than two",
        "it broke",
        "McNemar",
        "network: off",
    ):
        assert said in page, said


def test_what_falls_short_is_said() -> None:
    results = fake()
    results["tasks"]["mmlu"] |= {"shots": 1, "shots_most": 3}
    results["scores"]["one"]["mmlu"]["outcomes"]["undecided"] = 7
    page = evaluation_page(results)
    assert "MMLU: 1 to 3 of 5 wanted worked examples" in page
    assert "7 of 101 contexts were cut to fit the model" in page
    assert "lower bound, as 7 answers could not be compared" in page


def test_shares_and_other_metrics_have_axes_of_their_own() -> None:
    found = figures(fake())
    assert set(found) == {"scores", "scores-bits_per_byte", "differences"}
    told = json.dumps(spec(found["scores"]))
    assert "score (%)" in told
    assert "bits per byte" not in told
    assert "bits per byte" in json.dumps(spec(found["scores-bits_per_byte"]))


def test_one_model_has_no_pairs_and_needs_no_names() -> None:
    results = fake()
    del results["models"]["two"], results["scores"]["two"]
    results["differences"] = []
    assert difference_chart(results) is None
    page = evaluation_page(results)
    assert "Model against model" not in page
    assert "MMLU · one" not in json.dumps(spec(figures(results)["scores"]))


def test_what_could_not_be_judged_at_all_is_said() -> None:
    results = fake()
    for model in ("one", "two"):
        results["scores"][model]["mmlu"] |= {"metrics": {}, "groups": {}, "macro": None, "value": None, "n": 0}
    results["differences"] = []
    assert "no item could be judged" in evaluation_page(results)


@pytest.mark.parametrize("place", ["model", "title", "command", "note", "group"])
def test_hostile_text_stays_text(place: str) -> None:
    results = copy.deepcopy(fake())
    match place:
        case "model":
            for table in ("models", "scores"):
                results[table][HOSTILE] = results[table].pop("two")
            results["differences"][0]["b"] = HOSTILE
        case "title":
            results["tasks"]["mmlu"]["title"] = HOSTILE
        case "command":
            results["command"] = HOSTILE
        case "note":
            results["scores"]["one"]["mmlu"]["notes"] = [HOSTILE]
        case "group":
            results["scores"]["one"]["mmlu"]["groups"][HOSTILE] = estimate(0.5)
    page = evaluation_page(results)
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


def test_numbers_for_people() -> None:
    assert score_text(estimate(0.345, 0.034), "accuracy") == "34.5 ± 3.4 %"
    assert score_text(estimate(1.0, 0.1), "bits_per_byte") == "1.000 ± 0.100"
    none_right = {**estimate(0.0, 0.0), "low": 0.0, "high": 0.658}
    assert score_text(none_right, "accuracy") == "0.0 (≤ 65.8) %"
    assert score_text({**estimate(1.0, 0.0), "low": 0.342, "high": 1.0}, "accuracy") == "100.0 (≥ 34.2) %"
    assert interval_text(estimate(0.3, 0.05), "accuracy") == "20.0 to 40.0 %"
    assert difference_text({"value": -0.025, "standard_error": 0.01}, "accuracy") == "−2.5 ± 1.0 points"
    assert difference_text({"value": 0.5, "standard_error": None}, "loss") == "+0.500"
    assert (p_text(1e-9), p_text(0.04), p_text(None)) == ("< 0.001", "0.040", "–")
    assert [short_duration(s) for s in (4.2, 59.9, 200, 3599.7, 7500)] == [
        "4.2 s",
        "1:00 min",
        "3:20 min",
        "1:00 h",
        "2:05 h",
    ]
