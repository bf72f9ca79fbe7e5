"""Requests that a careless client sends: each gets an answer or a refusal that says what to do, and never a 5xx."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from finemoe.core.errors import DataError
from finemoe.server import asking
from finemoe.server.dialects import Dialect, Splitter
from finemoe.server.models import Limits, Options
from finemoe.server.writing import TextShape
from server.conftest import Live

ASKED = [{"role": "user", "content": "x"}]


def chat(live: Live, **more: Any) -> httpx.Response:
    return live.post("/v1/chat/completions", **{"model": "talker", "messages": ASKED, "max_tokens": 4, **more})


def refusal(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    said: str = answer.json()["error"]["message"]
    return said


def called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    returned = {"role": "tool", "content": "1", "tool_call_id": "1"}
    return [*ASKED, {"role": "assistant", "tool_calls": [call]}, returned]


@pytest.mark.parametrize(
    "name", ["messages", "tools", "special", "add_generation_prompt", "template", "self", "conversations", "tokenizer"]
)
def test_what_the_server_gives_a_template_cannot_be_set(live: Live, name: str) -> None:
    answer = chat(live, chat_template_kwargs={name: "x"})
    assert f"{name} cannot be set" in refusal(answer)
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_arguments_of_earlier_calls(live: Live) -> None:
    assert chat(live, messages=called('{"a": 1}')).status_code == 200
    assert "are no JSON" in refusal(chat(live, messages=called("[" * 50_000 + "]" * 50_000)))
    assert "not valid Unicode" in refusal(chat(live, messages=called('{"a": "\\ud800"}')))


def test_half_characters_are_refused_by_field(live: Live) -> None:
    half: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "\ud800"},
        "/v1/embeddings": {"input": ["\ud800"]},
        "/tokenize": {"text": "\ud800"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "\ud800"}]},
    }
    for path, body in half.items():
        text = json.dumps({"model": "talker", **body})
        answer = live.client.post(path, content=text, headers={"content-type": "application/json"})
        assert "not valid Unicode" in refusal(answer)
        assert "[" not in answer.json()["error"]["param"]


def test_deep_schemas_are_refused(live: Live) -> None:
    for depth in (300, 500, 700, 900):
        deep = '{"a":' * depth + "{}" + "}" * depth
        tool = '{"type": "function", "function": {"name": "f", "parameters": %s}}' % deep  # noqa: UP031
        form = '{"type": "json_schema", "json_schema": {"name": "f", "schema": %s}}' % deep  # noqa: UP031
        for field in (f'"tools": [{tool}]', f'"response_format": {form}'):
            text = f'{{"model": "talker", "messages": {json.dumps(ASKED)}, "max_tokens": 4, {field}}}'
            answer = live.client.post(
                "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400), answer.text


def test_a_body_that_cannot_be_read_is_told_why(live: Live) -> None:
    for body in (b'{"model":"writer","prompt":"\xff"}', b'{"seed":' + b"9" * 5000 + b"}", b"[" * 100_000):
        answer = live.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert "no JSON" in refusal(answer)


def test_an_empty_list_of_ids_begins_a_text(live: Live) -> None:
    answers = [
        live.post("/v1/completions", model="writer", prompt=prompt, max_tokens=4, temperature=0)
        for prompt in ("", [], [[]])
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_no_path_of_the_server_is_told(live: Live, talker: Path) -> None:
    said = refusal(chat(live, messages=called('{"a": NaN}')))
    assert said.startswith("chat template: ")
    assert str(talker.parent) not in said


def test_the_form_that_was_asked_for_is_the_answer_within_a_thought_too(live: Live) -> None:
    schema = {"enum": ["<tool_call>"]}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    asked = {"chat_template_kwargs": {"enable_thinking": True}, "response_format": form, "max_tokens": 60}
    message = chat(live, **asked).json()["choices"][0]["message"]
    assert json.loads(message["content"]) == "<tool_call>"
    assert "reasoning_content" not in message


def test_time_that_is_up_before_the_prompt_is_read(start: Callable[..., Live], writer: Path) -> None:
    limits = Limits(max_seconds=1e-6, max_new_tokens=8)
    live = start({"writer": writer}, Options(limits=limits, cache_bytes=4 << 20))
    asked = {"model": "writer", "prompt": "xyz", "echo": True, "logprobs": 1}  # 16 tokens would be too many here
    choice = live.post("/v1/completions", **asked).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("xyz", "length")
    assert choice["logprobs"]["token_logprobs"] == [None] * len(choice["logprobs"]["tokens"])
    assert "[DONE]" in live.post("/v1/completions", stream=True, **asked).text


def test_a_prompt_that_is_too_long_is_named_by_its_own_field(live: Live) -> None:
    answer = live.post("/v1/completions", model="writer", prompt=[5] * 300)
    assert answer.json()["error"]["param"] == "prompt"


def test_brackets_without_end_in_a_call_are_shown_as_they_are() -> None:
    splitter = Splitter(Dialect(tools="hermes"), tools=True, thinking=False)
    deep = "<tool_call>" + "[" * 50_000 + "</tool_call>"
    assert "".join(part.text for part in [*splitter.push(deep), *splitter.finish()]) == deep


def test_text_that_a_stop_held_back_comes_when_time_is_up(
    start: Callable[..., Live], writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start({"writer": writer}, Options(limits=Limits(max_seconds=0.5), cache_bytes=4 << 20))
    engine = live.engine("writer")
    ordinary = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.02) or ordinary())
    asked = {"model": "writer", "prompt": "x", "max_tokens": 200, "stop": "a" * 199 + "b"}
    answer = live.post("/v1/completions", finemoe={"choice": ["a" * 200]}, **asked).json()
    assert answer["usage"]["completion_tokens"] < 200
    assert set(answer["choices"][0]["text"]) == {"a"}


def test_a_stream_that_breaks_says_so(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise ValueError("a defect with /a/path in it")

    monkeypatch.setattr(TextShape, "choice", broken)
    text = live.post("/v1/completions", model="writer", prompt="x", max_tokens=2, stream=True).text
    assert "something broke in the server" in text
    assert "/a/path" not in text


def test_signs_at_which_clients_end_a_line_are_spelled_out_in_streams(live: Live) -> None:
    said = "a\u2028b\u2029c\x85d"
    body = {"model": "writer", "prompt": "x", "max_tokens": 60, "stream": True, "finemoe": {"choice": [said]}}
    with live.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == said


def test_what_a_tokenizer_refuses_is_the_clients_mistake(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def holes(*given: Any) -> Any:
        raise DataError("token id 7 is none of the vocabulary")

    monkeypatch.setattr(asking, "completion", holes)
    assert "token id 7" in refusal(live.post("/v1/completions", model="writer", prompt=[7]))


def test_a_number_has_one_name(live: Live) -> None:
    experts = {"disabled": {"1": [2], "01": [3]}}
    refusal(live.post("/v1/completions", model="writer", prompt="x", finemoe={"experts": experts}))
    refusal(live.post("/v1/completions", model="writer", prompt="x", logit_bias={"7": 1, "07": 2}))
    assert live.post("/v1/completions", model="writer", prompt="x", logit_bias={"0": 1, "10": 2}).status_code == 200
