"""The page in a real browser, headless: what a person does with it, wide and narrow, light and dark."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.conftest import Live

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("FINEMOE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install Debian's, or name one in FINEMOE_CHROMIUM"),
    pytest.mark.filterwarnings("ignore"),  # of what drives the browser
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide, light", "narrow, dark"])
def page(request: pytest.FixtureRequest, browser: Any, live: Live) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme)
    shown = context.new_page()
    odd: list[str] = []
    shown.on("pageerror", lambda error: odd.append(str(error)))
    shown.on("console", lambda said: odd.append(said.text) if said.type in ("error", "warning") else None)
    shown.set_default_timeout(20_000)
    shown.goto(live.address)
    shown.wait_for_selector("#model option", state="attached")
    yield shown
    assert not odd
    assert shown.evaluate("document.documentElement.scrollWidth") <= width  # nothing scrolls sideways
    context.close()


def say(page: Any, text: str) -> None:
    page.fill("#draft", text)
    page.press("#draft", "Enter")


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def answers(page: Any, count: int) -> Any:
    """So many answers, once none of them is being written any more."""
    found = page.locator("#log .message.assistant")
    until(lambda: found.count() == count and page.locator("#stop").is_hidden())
    return found


def set_up(page: Any, tokens: int, temperature: float = 1.0) -> None:
    page.click("#settings-open")
    for name, value in (("max_tokens", tokens), ("temperature", temperature)):
        page.fill(f"input[name={name}]", str(value))
        page.press(f"input[name={name}]", "Tab")
    page.keyboard.press("Escape")


def test_a_conversation_is_written_and_is_there_after_reloading(page: Any) -> None:
    set_up(page, 12)
    say(page, "Hello there")
    answers(page, 1)
    say(page, "And now?")
    before = answers(page, 2).all_inner_texts()
    page.reload()
    page.wait_for_selector("#log .message.assistant")
    assert len(answers(page, 2).all_inner_texts()) == len(before)
    assert "Hello there" in page.inner_text("#log")


def test_a_long_answer_is_stopped_and_asked_for_again(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = live.engine("talker")
    ordinary = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or ordinary())  # as a large model
    set_up(page, 128, 1.5)
    say(page, "Hello there")
    written = page.locator("#log .message.assistant .message-body")
    until(lambda: written.count() == 1 and bool(written.inner_text().strip()))
    page.click("#stop")
    answers(page, 1)
    live.wait_until_idle("talker")
    monkeypatch.setattr(engine, "step", ordinary)
    page.get_by_role("button", name="Retry").click()
    answers(page, 1)
    assert "2/2" in page.inner_text("#log")
    page.get_by_role("button", name="Earlier version").click()
    assert "1/2" in page.inner_text("#log")


def test_a_message_is_edited(page: Any) -> None:
    set_up(page, 8)
    say(page, "Hello there")
    answers(page, 1)
    page.get_by_role("button", name="Edit").click()
    page.locator("#log .message.user textarea").fill("Good morning")
    page.get_by_role("button", name="Send as a new version").click()
    until(lambda: "2/2" in page.inner_text("#log"))
    answers(page, 1)
    assert "Good morning" in page.inner_text("#log")
    assert "Hello there" not in page.inner_text("#log")


def test_an_expert_is_switched_off_and_the_answers_stand_side_by_side(page: Any) -> None:
    set_up(page, 12, 0.0)
    if page.get_attribute("#view-toggle", "aria-checked") == "false":
        page.click("#view-toggle")
    say(page, "Hello there")
    answers(page, 1)
    page.locator("#log .message.assistant .tok").nth(2).click()
    page.locator("#inspector").get_by_role("button", name="xpert").first.click()
    page.get_by_role("button", name="Switch off").first.click()
    compared = page.locator(".compare .summary")
    until(lambda: compared.count() == 1 and any(char.isdigit() for char in compared.inner_text()))
    assert page.locator(".compare .column").count() == 2


def test_two_models_answer_side_by_side(page: Any) -> None:
    set_up(page, 8)
    page.fill("#draft", "Hello there")
    page.click("#compare-open")
    page.get_by_role("button", name="Send to both").click()
    shown = page.locator(".compare, dialog")
    until(lambda: any("writer" in text and "talker" in text for text in shown.all_inner_texts()))


def test_a_request_is_shown_as_curl(page: Any) -> None:
    page.fill("#draft", "Hello there")
    page.click("#curl-open")
    shown = page.locator("dialog").inner_text()
    assert "curl" in shown
    assert "/v1/chat/completions" in shown


def test_axe_finds_no_violation(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    set_up(page, 12)
    say(page, "Hello there")
    answers(page, 1)
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
