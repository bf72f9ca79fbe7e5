"""What the page keeps in the browser, and what it then sends: two tabs, a page closed in an answer, text as tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.server.models import Options
from server.conftest import Live
from server.test_page import answers, browser, page, pytestmark, say, set_up, until

__all__ = ["browser", "page", "pytestmark"]
PAGE = Path(__file__).parents[2] / "src/finemoe/server/page"
COPY = """() => {
  const range = document.createRange();
  range.selectNodeContents(document.querySelector('.tokens'));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  const event = new ClipboardEvent('copy', {clipboardData: new DataTransfer(), bubbles: true, cancelable: true});
  document.querySelector('.tokens').dispatchEvent(event);
  return event.clipboardData.getData('text/plain');
}"""


def bodies(page: Any) -> list[dict[str, Any]]:
    """What is sent from now on."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    return sent


def given(page: Any, turns: list[dict[str, Any]], trace: dict[str, Any] | None = None, model: str = "talker") -> None:
    """The page with this conversation in its storage."""
    nodes, chosen, parent = {}, {}, "root"
    for at, turn in enumerate(turns):
        nodes[f"n{at}"] = {"id": f"n{at}", "parent": parent, "created": 1, **turn}
        chosen[parent] = parent = f"n{at}"
    kept = {"id": "c", "title": "", "updated": 1, "model": model, "system": "", "experts": {}}
    entries = {"conversation.c": {**kept, "nodes": nodes, "chosen": chosen}, "last": "c", "trace.t": trace}
    for name, value in entries.items():
        page.evaluate("([name, text]) => localStorage.setItem('finemoe.' + name, text)", [name, json.dumps(value)])
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    page.wait_for_selector("#log .message")


def slowly(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = live.engine("talker")
    ordinary = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or ordinary())  # as a large model


def test_the_files_of_the_page_stay_small() -> None:
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 150_000


def with_a_second_tab(page: Any, most: int) -> Any:
    """A question is answered in `page`, and a second tab shows it."""
    set_up(page, most)
    say(page, "one")
    answers(page, 1)
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#model option", state="attached")
    answers(other, 1)
    return other


def test_two_tabs_keep_what_each_has_written(page: Any) -> None:
    other = with_a_second_tab(page, 4)
    say(other, "two")
    answers(other, 2)
    until(lambda: "two" in page.inner_text("#log"))
    say(page, "three")
    answers(page, 3)
    other.close()
    page.reload()
    answers(page, 3)
    users = page.locator("#log .message.user .message-body").all_inner_texts()
    assert users == ["one", "two", "three"]


def test_what_two_tabs_write_at_the_same_place_are_versions(
    page: Any, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_a_second_tab(page, 8)
    with monkeypatch.context() as patch:
        slowly(live, patch)
        say(page, "two")
        page.wait_for_selector("#stop:visible")
        other.locator("#log .message.user").first.get_by_role("button", name="Edit").click()
        other.locator("#log textarea").fill("three")
        other.get_by_role("button", name="Send as a new version").click()
        answers(page, 2)
        until(lambda: other.locator("#stop").is_hidden())
    page.reload()
    last = page.evaluate("JSON.parse(localStorage.getItem('finemoe.last'))")
    nodes = page.evaluate(f"JSON.parse(localStorage.getItem('finemoe.conversation.{last}')).nodes")
    assert {node["content"] for node in nodes.values() if node["role"] == "user"} == {"one", "two", "three"}


def test_a_page_closed_in_an_answer_keeps_what_has_come(page: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(page, 60, 1.5)
    with monkeypatch.context() as patch:
        slowly(live, patch)
        say(page, "Hello there")
        written = page.locator("#log .message.assistant .message-body")
        until(lambda: written.count() == 1 and bool(written.inner_text().strip()))
        page.reload()
        until(lambda: written.count() == 1 and bool(written.inner_text().strip()))
    live.wait_until_idle("talker")
    assert "Cut off: the page was closed" in page.inner_text("#log")
    assert page.get_by_role("button", name="Retry").is_visible()


def test_a_question_without_an_answer_is_sent_with_the_next(page: Any) -> None:
    given(page, [{"role": "user", "content": "one"}, {"role": "assistant", "content": "", "finish": "cut"}])
    set_up(page, 4)
    sent = bodies(page)
    say(page, "two")
    answers(page, 2)
    assert [(each["role"], each["content"]) for each in sent[0]["messages"]] == [("user", "one\n\ntwo")]


def test_tokens_are_copied_as_they_were_written(page: Any) -> None:
    if page.get_attribute("#view-toggle", "aria-checked") == "false":
        page.click("#view-toggle")
    texts = ["pa", "use", ":\n    ", "re", "turn", " x", "\n\n", "\tend", "", "  two"]
    tokens = [{"t": text, "i": 1, "p": -0.1, "e": [[0]], "g": [[1]], "s": []} for text in texts]
    answer = {"role": "assistant", "content": "".join(texts), "trace": "finemoe.trace.t", "model": "talker"}
    trace = {"model": "talker", "layers": [1], "tokens": tokens, "a": []}
    given(page, [{"role": "user", "content": "one"}, answer], trace)
    assert page.evaluate(COPY) == "".join(texts)
    assert page.locator(".tok .sp").count() == 3  # " x", "  two"
    assert page.locator(".tail").inner_text() == "    "
    dot = "getComputedStyle(document.querySelector('.sp'), '::before').content"
    assert "·" in page.evaluate(dot)


def test_a_chat_that_a_base_model_reads_has_its_turns_apart(page: Any) -> None:
    turns = [{"role": "user", "content": "Say hello in French."}, {"role": "assistant", "content": "Bonjour"}]
    given(page, turns, model="writer")
    page.select_option("#model", "writer")
    set_up(page, 4)
    sent = bodies(page)
    say(page, "And")
    answers(page, 2)
    assert sent[0]["prompt"] == "Say hello in French.\n\nBonjour\n\nAnd"
    page.click("#send")
    answers(page, 3)
    assert sent[1]["prompt"].startswith(sent[0]["prompt"])
    assert not sent[1]["prompt"].startswith(sent[0]["prompt"] + "\n\n")


def test_a_refused_key_is_told(browser: Any, start: Callable[..., Live], writer: Path) -> None:
    live = start({"writer": writer}, Options(cache_bytes=4 << 20), key="secret")
    shown = browser.new_context().new_page()
    shown.goto(live.address)
    for key, told in (("wrong", False), ("secret", True)):
        shown.wait_for_selector("dialog")
        until(lambda told=told: ("did not accept this key" in shown.inner_text("dialog")) == told)
        shown.fill("dialog input", key)
        shown.press("dialog input", "Enter")
    shown.wait_for_selector("#model option", state="attached")
    shown.context.close()
