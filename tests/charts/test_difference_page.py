"""The page and figures of a difference of routing."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.difference.figures import figures
from finemoe.charts.difference.page import difference_page
from finemoe.charts.difference.words import summary

HOSTILE = "</script><img src=x onerror=alert(1)>"


def flips(rate: float) -> dict[str, Any]:
    return {
        "flip_rate": {"mean": rate, "low": rate - 0.01, "high": rate + 0.01}, "any_change": 2 * rate,
        "top1_flip_rate": rate / 2, "gate_shift": 0.3, "flip_rate_router": rate / 2, "flip_rate_states": rate / 4,
        "gate_a": 0.5, "gate_b": 0.6,
    }  # fmt: skip


def expert(number: int, verdict: str, change: float) -> dict[str, Any]:
    rates = {"rate_a": 0.25, "rate_b": 0.25 + change, "load_a": 1.0, "load_b": 1 + 4 * change}
    interval = {"change": change, "low": change - 0.01, "high": change + 0.01}
    return {
        "layer": 1,
        "expert": number,
        **rates,
        **interval,
        "verdict": verdict,
        "domains": {"law": change, "code": 0},
    }


def results() -> dict[str, Any]:
    loss = {"loss_a": 2.0, "loss_b": 1.75, "difference": {"mean": -0.25, "low": -0.3, "high": -0.2}}
    return {
        "before": "runs/base", "after": "runs/tuned", "tokens": 2000, "notes": ["A note."],
        "date": "2026-01-02T03:04:05Z",
        "confidence": 0.95, "command": "finemoe analyze difference runs/base runs/tuned", "finemoe_version": "1",
        "domains": [
            {"domain": name, "tokens": size, **loss} for name, size in (("all", 2000), ("law", 900), ("code", 1100))
        ],
        "layers": [
            {"layer": layer, "domains": {"all": flips(rate), "law": flips(rate + 0.1), "code": flips(rate - 0.1)}}
            for layer, rate in ((1, 0.2), (3, 0.4))
        ],
        "experts": [
            expert(0, "gained", 0.1), expert(1, "lost", -0.1), expert(2, "undecided", 0.0), expert(3, "removed", -0.25)
        ],
    }  # fmt: skip


def test_the_summary_says_what_changed():
    lines = summary(results())
    assert "30.0 % of the choices of experts changed (mean of 2 layers), most in layer 3: 40.0 %." in lines[0]
    assert "only the routers of the second model 15.0 % would have changed, and 7.5 %" in lines[1]
    assert lines[2] == "Load of the 4 experts: 1 gained, 1 lost, 1 undecided, 1 removed."
    assert lines[3] == "Loss 2.000 → 1.750 nats per token: −0.250 (−0.300 to −0.200)."
    assert lines[4] == "A note."


def test_an_expert_that_nothing_used_can_be_removed():
    """What pruning takes first."""
    found = results()
    idle = {"rate_a": 0.0, "rate_b": 0.0, "load_a": 0.0, "load_b": 0.0, "change": 0.0, "low": 0.0, "high": 0.0}
    found["experts"][3] |= {**idle, "domains": {"law": 0.0, "code": 0.0}}
    assert "Removed (1)" in difference_page(found)


def test_the_page_holds_every_figure_and_list():
    page = difference_page(results())
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for said in ("Experts that gained (1)", "Experts that lost (1)", "Removed (1)", "L1 E0", "−0.40", "law 0.40"):
        assert said in text
    assert text.count("data-chart") == 4
    assert "finemoe analyze difference runs/base runs/tuned" in text


def test_hostile_names_stay_text():
    made = results()
    made["before"] = made["notes"][0] = made["command"] = HOSTILE
    made["domains"][1]["domain"] = HOSTILE
    for layer in made["layers"]:
        layer["domains"][HOSTILE] = layer["domains"].pop("law")
    for each in made["experts"]:
        each["domains"] = {HOSTILE: 0.1}
    page = re.sub(r"<script.*?</script>", "", difference_page(made), flags=re.DOTALL)
    assert "<img" not in page


def test_figures_say_what_they_show():
    made = {name: chart.to_dict() for name, chart in figures(results()).items()}
    assert set(made) == {"flips", "causes", "load_change", "loss"}
    assert "layer 1 20.0 %, layer 3 40.0 %" in made["flips"]["description"]
    assert "expert 3 of layer 1, −1.00 times uniform" in made["load_change"]["description"]
    assert "all −0.250, law −0.250" in made["loss"]["description"]


def test_many_domains_get_a_map_and_the_most_changed_is_first():
    made = results()
    for number in range(12):
        name = f"d{number}"
        made["domains"].append(made["domains"][1] | {"domain": name})
        for layer in made["layers"]:
            layer["domains"][name] = flips(0.05 * number)
    chart = theme.spec(figures(made)["flips"])
    cells = chart["layer"][0]
    assert cells["mark"]["type"] == "rect"
    assert [len(rows) for rows in chart["datasets"].values()] == [2 * 15]  # layers, and 14 domains after all the text
    assert cells["encoding"]["y"]["sort"][:2] == ["all", "d11"]
    assert "Choices that changed, by layer and domain: all the text first" in difference_page(made)


def test_experts_whose_change_is_undecided_are_faded():
    chart = theme.spec(figures(results())["load_change"])
    (rows,) = chart["datasets"].values()
    told = {row["expert"]: row["certain"] for row in rows}
    assert told == {0: "decided", 1: "decided", 2: "undecided", 3: "decided"}
    opacity = chart["encoding"]["opacity"]
    assert opacity["scale"] == {"domain": ["decided", "undecided"], "range": [1, 0.3]}
    assert opacity["legend"]["orient"] == "top"


@pytest.mark.parametrize("single", [True, False])
def test_one_domain_and_no_intervals(single):
    made = copy.deepcopy(results())
    if single:
        made["domains"].pop()
    for each in made["domains"]:
        each["difference"] |= {"low": None, "high": None}
    for layer in made["layers"]:
        for found in layer["domains"].values():
            found["flip_rate"] |= {"low": None, "high": None}
    for each in made["experts"]:
        each |= {"low": None, "high": None, "verdict": "undecided"}
    page = difference_page(made)
    assert "too few windows for an interval" in page
    assert "No expert&#39;s load changed by more than chance" in page
    assert ("Choices changed, by domain" in page) == (not single)
