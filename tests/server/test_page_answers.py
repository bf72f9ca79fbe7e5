"""What the page says of answers, settings and experts, and that it asks for no more than fits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.server.models import Options
from server.conftest import Live
from server.talkers import write_run
from server.test_page import answers, browser, page, pytestmark, say, set_up, until
from server.test_page_kept import bodies, given, slowly

__all__ = ["browser", "page", "pytestmark"]
DENSE = {"kind": "dense", "ffn_hidden_size": 48}


def experts(page: Any) -> None:
    if page.get_attribute("#view-toggle", "aria-checked") == "false":
        page.click("#view-toggle")


@pytest.fixture
def apart(browser: Any) -> Any:
    """A page whose console may tell of refused requests."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    shown = context.new_page()
    shown.set_default_timeout(20_000)
    yield shown
    context.close()


def test_an_answer_near_the_end_of_the_context_has_the_length_that_fits(apart: Any, live: Live) -> None:
    apart.goto(live.address)
    apart.wait_for_selector("#model option", state="attached")
    apart.select_option("#model", "writer")
    room = 0
    text = "q" * 245
    for size in range(245, 200, -1):
        text = "q" * size
        told = live.post("/v1/completions", model="writer", prompt=text, max_tokens=128).json()
        if "or fewer" in told.get("error", {}).get("message", ""):
            room = int(told["error"]["message"].split("ask for ")[1].split()[0])
            break
    assert 0 < room < 128
    sent = bodies(apart)
    apart.click("#settings-open")
    apart.check("input[name=ignore_end]")
    apart.keyboard.press("Escape")
    say(apart, text)
    answers(apart, 1)
    assert [body["max_tokens"] for body in sent] == [128, room]
    assert "Broke off" not in apart.inner_text("#log")
    apart.click("#send")
    answers(apart, 2)
    assert "Nothing more fits" in apart.inner_text("#log")


def test_settings_show_what_holds(page: Any) -> None:
    page.click("#settings-open")
    shown = {
        name: page.get_attribute(f"input[name={name}]", "placeholder")
        for name in ("temperature", "top_p", "max_tokens")
    }
    assert shown == {"temperature": "0.8", "top_p": "0.95", "max_tokens": "512"}
    assert page.get_attribute("input[name=repetition_penalty]", "placeholder") == "1"
    page.keyboard.press("Escape")
    set_up(page, 4, 0.5)
    sent = bodies(page)
    say(page, "Hello there")
    answers(page, 1)
    assert sent[0]["temperature"] == 0.5
    assert sent[0]["top_p"] == 0.95


def test_a_setting_that_cannot_be_is_told(page: Any) -> None:
    page.click("#settings-open")
    page.fill("input[name=temperature]", "7")
    page.keyboard.press("Escape")
    assert page.inner_text("#wrong-temperature") == "A number from 0 to 2, or empty."
    assert page.get_attribute("input[name=temperature]", "aria-invalid") == "true"
    page.get_by_role("button", name="Close", exact=True).click()
    until(lambda: "Temperature was not changed to 7" in page.inner_text("#notice"))
    page.click("#settings-open")
    page.fill("input[name=max_tokens]", "-5")
    page.keyboard.press("Escape")
    assert "from 1" in page.inner_text("#wrong-max_tokens")
    page.fill("input[name=max_tokens]", "5")
    page.keyboard.press("Escape")
    until(lambda: page.locator("dialog").count() == 0)


def test_a_comparison_without_a_difference_says_what_changed(page: Any) -> None:
    experts(page)
    texts = ["a", "b", "c"]
    tokens = [{"t": text, "i": 1, "p": -0.1, "e": [[at % 2]], "g": [[1]], "s": []} for at, text in enumerate(texts)]
    body = {"model": "talker", "seed": 1, "stream": True, "max_tokens": 3, "finemoe": {"routing": True}}
    request = {"method": "POST", "path": "v1/chat/completions", "body": body}
    answer = {"role": "assistant", "content": "abc", "trace": "finemoe.trace.t", "model": "talker", "request": request}
    trace = {"model": "talker", "layers": [1], "tokens": tokens, "a": [[["a", -0.1]]]}
    given(page, [{"role": "user", "content": "one"}, answer], trace)
    other = [{"token": text, "id": 1, "logprob": -0.2, "experts": {"1": [2]}, "gates": {"1": [1]}} for text in texts]
    chunk = {"choices": [{"delta": {"content": "abc"}, "finish_reason": "length", "finemoe": {"tokens": other}}]}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    page.locator(".tok").first.click()
    heads = page.locator(".alternatives thead")
    assert heads.inner_text().split() == ["Token", "Probability", "Log-probability"]
    assert heads.bounding_box()["height"] > 10
    page.locator("#inspector .chip").first.click()
    assert "finemoe analyze experts MODEL --out MODEL/experts" in page.inner_text("#inspector")
    page.get_by_role("button", name="Switch off").first.click()
    said = "No token differs. 2 of 3 tokens had used expert 0 of layer 1. The largest change of a probability is 0.086."
    until(lambda: page.locator(".compare .summary").inner_text() == said)
    page.get_by_role("button", name="Keep for the next answers").click()
    assert "Kept: the next answers are made without expert 0 of layer 1." in page.inner_text(".compare")
    differing = stream.replace('"token": "c"', '"token": "d"').replace('"content": "abc"', '"content": "abd"')
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=differing))
    if page.locator("#panel-toggle").is_visible():
        page.click("#panel-toggle")  # a comparison has closed the panel of a small window
    page.locator("#inspector").get_by_role("button", name="Force").click()
    until(lambda: "1 of 3 tokens are different" in page.locator(".compare .summary").inner_text())
    page.wait_for_timeout(200)  # frames that were asked for before take no mark away
    assert page.locator(".compare .tok.differs").all_inner_texts() == ["c", "d"]


def test_a_dense_model_promises_no_load(apart: Any, start: Callable[..., Live], tmp_path: Path) -> None:
    dense = write_run(tmp_path / "dense", chat=True, feed_forward=DENSE)
    live = start({"dense": dense}, Options(cache_bytes=4 << 20))
    apart.goto(live.address)
    apart.wait_for_selector("#model option", state="attached")
    set_up(apart, 4)
    say(apart, "Hello there")
    answers(apart, 1)
    until(lambda: "no experts to choose from" in apart.inner_text("#heatmap"))


def test_an_answer_that_was_left_says_so(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(page, 60, 1.5)
    with monkeypatch.context() as patch:
        slowly(live, patch)
        say(page, "Hello there")
        written = page.locator("#log .message.assistant .message-body")
        until(lambda: written.count() == 1 and bool(written.inner_text().strip()))
        page.evaluate("document.getElementById('new').click()")
        until(lambda: page.locator("#log .welcome").count() == 1)
    live.wait_until_idle("talker")
    page.evaluate("document.querySelector('#conversations .open').click()")
    answers(page, 1)
    assert "stopped when you left" in page.inner_text("#log")


def test_of_two_models_the_one_that_writes_is_named(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(page, 4)
    with monkeypatch.context() as patch:
        slowly(live, patch)
        page.fill("#draft", "Hello there")
        page.click("#compare-open")
        page.get_by_role("button", name="Send to both").click()
        summary = page.locator(".compare .summary")
        until(lambda: summary.count() == 1 and "writing..." in summary.inner_text())
        until(lambda: "token" in summary.inner_text().lower() and "writing" not in summary.inner_text())


def test_a_notice_of_a_failed_import_goes_with_the_next(page: Any) -> None:
    def take(text: str) -> None:
        with page.expect_file_chooser() as chosen:
            page.evaluate("document.getElementById('import').click()")
        chosen.value.set_files({"name": "a.json", "mimeType": "application/json", "buffer": text.encode()})

    take("no JSON")
    until(lambda: "not JSON" in page.inner_text("#notice"))
    take(json.dumps({"messages": [{"role": "user", "content": "Hello there"}]}))
    until(lambda: "Hello there" in page.inner_text("#log"))
    assert page.locator("#notice").is_hidden()


def test_a_conversation_deleted_in_an_answer_stays_deleted(
    page: Any, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(page, 40, 1.5)
    with monkeypatch.context() as patch:
        slowly(live, patch)
        say(page, "Hello there")
        page.wait_for_selector("#stop:visible")
        page.evaluate("document.querySelector('#conversations [title=Delete]').click()")
        page.locator("dialog").get_by_role("button", name="Delete").click()
        until(lambda: page.locator("#log .welcome").count() == 1)
    live.wait_until_idle("talker")
    time.sleep(0.2)
    assert "Hello there" not in page.evaluate("JSON.stringify(localStorage)")
