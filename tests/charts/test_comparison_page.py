"""The report of a comparison: complete, self-contained, and safe with text that nobody checked."""

from __future__ import annotations

import json
import math
import re

import pytest
from fake_results import fake_results

from finemoe.charts import theme
from finemoe.charts.comparison.figures import figures
from finemoe.charts.comparison.page import comparison_page

ALLOWED_ADDRESSES = ("http://www.w3.org/", "https://vega.github.io/schema/")


@pytest.fixture(scope="module")
def page() -> str:
    return comparison_page(fake_results())


def test_every_arm_and_section_is_there(page):
    for label in ("Dense", "Hash Layer", "Switch", "GShard", "DeepSeekMoE"):
        assert label in page
    for heading in ("Summary", "Results", "Loss curves", "Final losses", "Pair by pair", "Expert load", "Samples"):
        assert re.search(rf"<h2[^>]*>\s*{heading}\s*</h2>", page), heading


def test_nothing_is_loaded_from_elsewhere(page):
    outside_script = re.sub(r"(<script[^>]*>).*?</script>", r"\1</script>", page, flags=re.DOTALL)
    loads = re.findall(
        r"""<(?:script|img|iframe|audio|video|source)[^>]*\ssrc\s*=\s*["']?([^"'\s>]+)""", outside_script
    )
    assert [source for source in loads if not source.startswith("data:")] == []
    assert re.findall(r"<link[^>]*href", outside_script) == []
    assert re.findall(r"url\(\s*['\"]?http", outside_script) == []
    assert "default-src 'none'" in page


def test_charts_carry_their_data(page):
    specs = [
        json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    ]
    assert specs
    assert all(
        address.startswith(ALLOWED_ADDRESSES) for address in re.findall(r'"(https?://[^"]+)"', json.dumps(specs))
    )


@pytest.mark.parametrize("field", ["title", "command", "prompt", "completion", "label", "note"])
def test_hostile_text_stays_text(field):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    results = fake_results()
    arm = results["arms"]["deepseek-moe"]
    match field:
        case "title" | "command":
            results[field] = hostile
        case "prompt" | "completion":
            arm["sample"][field] = hostile
        case "label":
            arm["label"] = hostile
        case "note":
            results["notes"] = [hostile]
    page = comparison_page(results)
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page


def test_one_seed_has_no_intervals():
    page = comparison_page(fake_results(seeds=1))
    assert "One seed: there are no intervals." in page
    assert "±" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_incomplete_results_say_so():
    results = fake_results()
    results["complete"] = False
    assert "incomplete" in comparison_page(results)


def damaged(kind: str) -> dict:
    results = fake_results()
    arm = results["arms"]["deepseek-moe"]
    match kind:
        case "nan loss":
            arm["validation_loss"] = {"mean": math.nan, "low": None, "high": None, "seeds": []}
        case "no curve":
            arm["curve"] = []
        case "no sample":
            arm["sample"] = None
        case "no load":
            arm["load"] = arm["max_vio"] = None
        case "no paper":
            for one in results["arms"].values():
                one["paper"] = None
        case "one arm":
            results["arms"] = {"dense": results["arms"]["dense"]}
            results["pairs"] = []
        case "twelve arms":
            results = fake_results(count=12)
    return results


@pytest.mark.parametrize("kind", ["nan loss", "no curve", "no sample", "no load", "no paper", "one arm", "twelve arms"])
def test_gaps_do_not_break_the_page(kind):
    page = comparison_page(damaged(kind))
    assert page.rstrip().endswith("</html>")
    assert ">nan<" not in page.lower()


def test_figures_are_saved_as_svg_and_png(tmp_path):
    results = fake_results(seeds=2)
    paths = theme.save(figures(results), tmp_path / "figures")
    assert {path.stem for path in paths} == set(figures(results))
    for path in paths:
        head = path.read_bytes()[:300]
        assert head.startswith(b"\x89PNG\r\n") if path.suffix == ".png" else b"<svg" in head, path
    assert {path.suffix for path in paths} == {".svg", ".png"}
