"""The page of a plan: whole, self-contained, and honest about what was fitted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finemoe.charts import theme
from finemoe.charts.plan.figures import figures, memory_bars, time_line
from finemoe.charts.plan.page import plan_page
from finemoe.charts.plan.words import certainty, gib, moved, span, summary, took
from finemoe.parallel.planner.published import MEMORY_MODEL, model_of
from finemoe.runs.planning.distribution import plan


def rows_of(spec: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """What a mark is drawn from."""
    return data["values"] if "values" in data else spec["datasets"][data["name"]]


PIPED = ("parallel.pipeline=4", "parallel.expert=8", "parallel.schedule=zbv")


@pytest.fixture(scope="module")
def piped() -> dict[str, Any]:
    return plan(model_of(MEMORY_MODEL), 32, "h100", overrides=PIPED, tokens=1e12, recompute=True, refuse=False)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return plan("deepseek-v3", 8, "h800", refuse=False)


def test_a_page_has_all_that_a_plan_says(piped: dict[str, Any]) -> None:
    page = plan_page(piped)
    for heading in ("Summary", "Memory", "A step", "What is moved", "What others measured", "What the words mean"):
        assert heading in page
    assert "device-hours" in page
    assert "Published run on this device" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert "This layout does not fit" not in page
    assert "finemoe does not train like that" in page, "a V and shards"


def test_the_published_run_and_the_factor_are_told(alone: dict[str, Any]) -> None:
    page = plan_page(alone)
    assert "printed 2,664K device-hours" in page
    assert re.search(r"With one factor more, 1\.089, fitted on this run itself: 2,664K", page)
    assert "This layout does not fit" in page
    assert "judged" in page


def test_a_search_stands_in_the_page() -> None:
    found = plan("deepseek-moe-16b", 8, "h100", search=True)
    page = plan_page(found)
    assert found["search"]["ranked"][0]["options"] in page
    assert '<table class="wrap">' in page.partition("Layouts</h2>")[2].partition("</section")[0], "at 1000 px no bar"
    assert "The fastest" in page
    assert "layouts:" in page


def test_text_of_others_is_text(piped: dict[str, Any]) -> None:
    page = plan_page({**piped, "model": "<script>alert(1)</script>"})
    assert "<script>alert(1)" not in page


def test_bars_are_the_bytes(piped: dict[str, Any]) -> None:
    spec = theme.spec(memory_bars(piped))
    bars, limit = spec["layer"]
    total: dict[str, float] = {}
    for row in rows_of(spec, bars["data"]):
        total[row["rank"]] = total.get(row["rank"], 0) + row["gib"] * 2**30
    assert len(total) == 5
    assert max(total[f"rank {rank}"] for rank in range(4)) == pytest.approx(piped["memory"]["peak"]["total"])
    assert total["MaxVio 1"] == pytest.approx(piped["memory"]["uneven"]["total"])
    assert rows_of(spec, limit["data"])[0]["gib"] * 2**30 == pytest.approx(piped["memory"]["available"])


def test_a_time_line_only_where_there_is_a_pipeline(piped: dict[str, Any], alone: dict[str, Any]) -> None:
    assert time_line(alone) is None
    assert set(figures(alone)) == {"memory", "step"}
    line = theme.spec(figures(piped)["timeline"])
    rows = rows_of(line, line["data"])
    assert {row["rank"] for row in rows} == {f"rank {rank}" for rank in range(4)}
    assert all(row["end"] > row["start"] >= 0 for row in rows)
    assert {"forward", "backward, inputs", "backward, weights"} == {row["kind"] for row in rows}
    for chart in figures(piped).values():
        assert theme.draw(chart).startswith("<svg")


def test_words(piped: dict[str, Any], alone: dict[str, Any]) -> None:
    assert "it fits" in summary(piped)[0]
    assert "it does not fit" in summary(alone)[0]
    assert "PyTorch" in certainty(piped)
    assert "this machine" in certainty({**piped, "device": {**piped["device"], "family": "here"}})
    assert [gib(3 * 2**30), gib(5 * 2**20)] == ["3.0 GiB", "5.0 MiB"]
    assert [moved(1.5e12), moved(2e9), moved(3e6), moved(4e3), moved(5)] == ["1.5 TB", "2 GB", "3 MB", "4 kB", "5 B"]
    assert [took(0.0123), took(75)] == ["12.3 ms", "1 min 15 s"]
    assert span({"value": 2.664e6, "low": 0.5, "high": 12}) == "2.66M (0.50 to 12)"
