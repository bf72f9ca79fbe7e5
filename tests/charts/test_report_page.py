"""The generic page: policy, escaping and structure."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from fake_results import fake_results

from finemoe.charts.comparison.figures import loss_curves
from finemoe.charts.comparison.page import comparison_page
from finemoe.charts.page import Code, Details, Figure, Section, Table, Text, render_page

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028'\"&"


def test_the_policy_names_exactly_the_scripts_on_the_page():
    page = comparison_page(fake_results(seeds=1))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2
    assert re.findall(r"'sha256-([^']+)'", policy[1]) == digests
    assert "http" not in policy[1]


def test_hostile_text_survives_as_text_in_chart_data():
    results = fake_results()
    results["arms"]["gshard"]["label"] = "</script><b>"
    page = comparison_page(results)
    data = re.search(r'<script type="application/json" id="chart-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    shown = json.dumps(json.loads(data[1])["charts"], ensure_ascii=False)
    assert "</script><b>" in shown


def test_every_block_escapes():
    blocks = [
        Text([HOSTILE]), Table(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE), Code(HOSTILE, HOSTILE),
        Details(HOSTILE, [Text([HOSTILE])]),
    ]  # fmt: skip
    page = render_page(HOSTILE, [Section(HOSTILE, blocks)], subtitle=HOSTILE, banner=HOSTILE, footer=HOSTILE)
    assert "<script" not in page
    assert "<img" not in page
    assert "<!--" not in page


def test_a_page_without_charts_has_no_script():
    assert "<script" not in render_page("Plain", [Section("One", [Text(["Nothing to draw."])])])


@pytest.mark.parametrize("deep", [False, True])
def test_a_chart_inside_details_is_still_drawn(deep):
    chart = loss_curves(fake_results(), "tokens")
    blocks = [Figure([chart], "A curve.")]
    page = render_page("Curve", [Section("One", [Details("More", blocks)] if deep else blocks)])
    assert 'data-chart="0"' in page
    data = re.search(r'id="chart-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    (spec,) = json.loads(data[1])["charts"]
    assert spec["width"] == "container"
    assert "DeepSeekMoE 1.8" in spec["description"]


def test_tables_have_captions_and_header_cells():
    page = re.sub(r"<script.*?</script>", "", comparison_page(fake_results()), flags=re.DOTALL)
    assert page.count("<table>") == page.count("<caption>") > 3
    assert page.count('scope="row"') > 10
