"""The page of expert cards: structure, escaping, and in a browser: search, anchors, many experts, hostile text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts.cards.figures import figures
from finemoe.charts.cards.page import SCRIPT, cards_page, widget_data
from finemoe.charts.cards.words import leading
from finemoe.charts.page import Details, Section, Text, Widget, render_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>'&"


def card(layer: int, expert: int, domains: list[str], **changes: Any) -> dict[str, Any]:
    lead = expert % len(domains)
    rates = [0.3 if i == lead else 0.1 for i in range(len(domains))]
    return {
        "layer": layer, "expert": expert, "assignments": 90 + expert, "share": 0.25, "relative_load": 0.5 + expert / 4,
        "mean_gate": 0.2, "specialization": expert / 10, "divergence_bits": 0.1,
        "domains": [
            {"domain": name, "share": rate, "rate": rate, "lift": 2 * rate}
            for name, rate in zip(domains, rates, strict=True)
        ],
        "tokens": [{"id": expert, "text": f"␣word{expert}", "count": 9, "share": 0.1, "lift": 3.5}],
        "contexts": [{"before": "so a ", "token": f"word{expert}", "after": " was", "gate": 0.5, "domain": domains[0]}],
        "stability": [{"step": 100, "overlap": 0.25}],
        "nearest": {"router": [{"expert": 0, "value": 0.5}], "weights": [], "coactivation": []},
        **changes,
    }  # fmt: skip


def results(layers: int = 2, experts: int = 4, domains: tuple[str, ...] = ("english", "python")) -> dict[str, Any]:
    names = list(domains)
    return {
        "finemoe_version": "1", "date": "2026-01-02T03:04:05Z", "command": "finemoe analyze experts runs/x",
        "model": {"source": "runs/x"}, "tokens": 1000, "token_rule": "highest lift",
        "domains": [{"domain": name, "tokens": 500} for name in names],
        "layers": [
            {"layer": layer, "experts": experts, "experts_per_token": 2, "shared_experts": 1, "specialization": 0.2,
             "mutual_information_bits": 0.05, "chance_bits": 0.001, "stability": [{"step": 100, "overlap": 0.25}]}
            for layer in range(layers)
        ],
        "cards": [card(layer, expert, names) for layer in range(layers) for expert in range(experts)],
    }  # fmt: skip


def unscripted(page: str) -> str:
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Open a page in a browser; its document after the scripts ran, without them, and what the console said."""
    if BROWSER is None:
        pytest.skip("no chromium or chrome on PATH")

    def open_page(page: str, fragment: str = "") -> tuple[str, str]:
        file = tmp_path / "page.html"
        file.write_text(page, encoding="utf-8")
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", f"{file.as_uri()}{fragment}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        console = "\n".join(line for line in said if "Dropping" not in line)  # Vega-Lite on heights given in steps
        return unscripted(done.stdout), console

    return open_page


def shown(document: str) -> list[str]:
    return re.findall(r'<article id="(L\d+E\d+)"', document)


def facts(document: str) -> tuple[str, int]:
    found = re.search(r'<div class="widget"[^>]*>', document)
    assert found is not None
    state, count = (re.search(f'data-{name}="([^"]*)"', found[0]) for name in ("state", "shown"))
    assert state is not None
    assert count is not None
    return state[1], int(count[1])


def test_without_a_fragment_every_card_is_there_most_specialised_first(browse):
    document, console = browse(cards_page(results()))
    assert console == ""
    assert facts(document) == ("ready", 8)
    assert shown(document) == ["L0E3", "L1E3", "L0E2", "L1E2", "L0E1", "L1E1", "L0E0", "L1E0"]
    assert "8 of 8 experts" in document
    assert document.count('class="cell') == 8
    assert "<mark>word3</mark>" in document
    assert document.count("<svg") >= 4  # the charts are drawn beside it


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("#search=L1+E2", ["L1E2"]),
        ("#search=python+WORD&layer=0&sort=load", ["L0E3", "L0E1"]),
        ("#search=nothing+like+this", []),
    ],
)
def test_search_sort_and_filters_by_fragment(browse, fragment, expected):
    widget = Widget(SCRIPT, widget_data(results()), "cards")
    document, console = browse(render_page("Cards", [Section("Experts", [widget])]), fragment)
    assert console == ""
    assert facts(document) == ("ready", len(expected))
    assert shown(document) == expected
    assert document.count(" out") + document.count("out ") >= 8 - len(expected)
    assert ("No expert matches" in document) == (not expected)


def test_hostile_text_stays_text(browse):
    made = results(domains=(HOSTILE, "python"))
    made["model"]["source"] = made["command"] = HOSTILE
    for each in made["cards"]:
        each["tokens"][0]["text"] = HOSTILE
        each["contexts"][0] |= {"before": HOSTILE, "token": HOSTILE, "after": HOSTILE}
    page = cards_page(made)
    assert "<img" not in unscripted(page)
    document, console = browse(page, "#search=" + "%3Cb%3E'%26")
    assert console == ""
    assert "<img" not in document
    assert "<title>owned" not in document
    assert facts(document) == ("ready", 8)
    assert f"<mark>{html.escape(HOSTILE, quote=False)}</mark>" in document.replace("&quot;", '"')


def test_many_experts_are_made_only_when_looked_at(browse):
    widget = Widget(SCRIPT, widget_data(results(layers=28, experts=64)), "cards")
    document, console = browse(render_page("Many", [Section("Experts", [widget])]), "#L27E60")
    assert console == ""
    assert facts(document) == ("ready", 1792)
    assert document.count('class="cell') == 1792
    assert "L27E60" in shown(document)
    assert len(shown(document)) < 600


def test_a_script_that_fails_says_so_in_its_place(browse):
    page = render_page("x", [Section("y", [Widget(SCRIPT, {"domains": []}, "broken")])])
    document, _ = browse(page)
    assert 'data-state="failed"' in document
    assert "This part of the page could not be made" in document


def test_the_policy_runs_the_widgets_script_and_without_charts_nothing_is_compiled():
    page = render_page("x", [Section("y", [Details("z", [Widget(SCRIPT, widget_data(results()), "cards")])])])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].count("sha256-") == 1
    assert "unsafe-eval" not in policy[1]
    assert page.count("<script>") == 1
    assert "script-src 'none'" in render_page("x", [Section("y", [Text(["z"])])])


def test_the_data_block_holds_every_card_and_closes_no_script():
    made = results()
    made["cards"][0]["tokens"][0]["text"] = "</script>"
    page = cards_page(made)
    data = re.search(r'id="widget-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    (widget,) = json.loads(data[1])
    assert [each["id"] for each in widget["cards"]] == [f"L{n}E{e}" for n in range(2) for e in range(4)]
    assert widget["cards"][0]["tokens"][0]["text"] == "</script>"
    assert widget["cards"][3]["leading"] == 1


def test_a_card_of_an_idle_expert_and_of_one_domain():
    made = results(domains=("text",))
    made["cards"][0] |= {"assignments": 0, "specialization": float("nan"), "mean_gate": None, "tokens": []}
    data = widget_data(made)
    assert data["one_domain"]
    assert data["cards"][0]["leading"] is None
    assert "domains_layer_0" not in figures(made)
    assert "Expert cards" in cards_page(made)


def test_figures_have_a_map_for_each_layer_and_say_what_they_show():
    made = figures(results())
    assert set(made) == {"domains_layer_0", "domains_layer_1", "specialization", "stability"}
    assert "expert 0 on english" in made["domains_layer_0"].to_dict()["description"]
    assert "layer 1 0.20" in made["specialization"].to_dict()["description"]
    assert "0.25 at step 100" in made["stability"].to_dict()["description"]


def test_the_leading_domain_is_the_one_with_the_highest_rate():
    each = card(0, 1, ["a", "b", "c"])
    assert leading(each) == 1
    assert leading({**each, "assignments": 0}) is None


def test_too_many_maps_are_left_to_the_folder(monkeypatch):
    assert "There are too many experts to draw their maps" not in cards_page(results())
    monkeypatch.setattr("finemoe.charts.cards.page.MOST_CELLS", 15)
    assert "There are too many experts to draw their maps" in cards_page(results())
