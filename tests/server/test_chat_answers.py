"""Chat answers, asked for with the official client: whole, in pieces, in every shape."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from finemoe.checkpoint.language_model import open_language_model
from finemoe.generation import Request, SamplingConfig
from finemoe.generation.engine import Event, engine_for
from finemoe.server.answers import Choice
from finemoe.server.dialects import Dialect, Splitter
from server.conftest import Live

MESSAGES: list[Any] = [{"role": "user", "content": "Say something."}]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    given = {"model": "talker", "messages": MESSAGES, "max_completion_tokens": 12, "seed": 3, **more}
    return client.chat.completions.create(**given)


def gather(stream: Any) -> dict[int, dict[str, Any]]:
    """What a client puts together, by choice."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            own = found.setdefault(choice.index, {"content": "", "reasoning": "", "logprobs": [], "calls": []})
            assert own.get("reason") is None  # nothing comes behind the end
            own["content"] += choice.delta.content or ""
            own["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            own["logprobs"] += choice.logprobs.content if choice.logprobs else []
            own["calls"] += choice.delta.tool_calls or []
            own["reason"] = choice.finish_reason
        found.setdefault(-1, {})["usage"] = chunk.usage
    return found


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True},
        {"stop": ["e", "zz"]},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5, "logit_bias": {"40": 5}},
        {"extra_body": {"finemoe": {"regex": "<think>[a-c]{3}</think>[d-f]{4}"}}},
        {"response_format": {"type": "json_object"}, "max_completion_tokens": 30},
    ],
    ids=str,
)
def test_a_stream_is_the_whole_answer(client: openai.OpenAI, more: dict[str, Any]) -> None:
    whole = ask(client, **more)
    pieces = gather(ask(client, **more, stream=True, stream_options={"include_usage": True}))
    assert pieces.pop(-1)["usage"] == whole.usage
    assert len(pieces) == len(whole.choices) == more.get("n", 1)
    for choice in whole.choices:
        own = pieces[choice.index]
        assert own["content"] == (choice.message.content or "")
        assert own["reasoning"] == (getattr(choice.message, "reasoning_content", None) or "")
        assert own["reason"] == choice.finish_reason
        assert own["logprobs"] == (choice.logprobs.content if choice.logprobs else [])
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_logprobs_belong_to_the_content(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=4, max_completion_tokens=40)
    tokens = answer.choices[0].logprobs.content
    spelt = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert spelt == answer.choices[0].message.content
    for token in tokens:
        values = [other.logprob for other in token.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] <= 0


def test_logprobs_of_an_empty_answer_have_their_place(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, extra_body={"finemoe": {"choice": ["Yes"]}}, stop="Y")
    assert answer.choices[0].message.content == ""
    assert [token.token for token in answer.choices[0].logprobs.content][:1] == ["Y"]
    assert ask(client, extra_body={"finemoe": {"choice": ["Yes"]}}).choices[0].logprobs is None


def test_tokens_that_are_read_late_are_no_last_ones(writer: Path) -> None:
    # The engine has a thread of its own: a sequence may have ended before its earlier tokens are looked at.
    opened = open_language_model(writer)
    engine = engine_for(opened)
    engine.submit(Request(tuple(opened.tokenizer.encode("a word")), SamplingConfig(seed=1, max_new_tokens=12)))
    events = list(engine.events())
    ends = events[-1].finish_reason == "stop"

    def looked_at(some: list[Event]) -> list[int]:
        splitter = Splitter(Dialect(), tools=False, thinking=False)
        choice = Choice(0, opened.tokenizer, splitter=splitter, logprobs=True, routing=False)
        return [entry["id"] for event in some for entry in choice.push(event).logprobs]

    ids = [event.token_id for event in events]
    assert looked_at(events) == ids[: -1 if ends else None]
    events[-1].sequence.finish_reason = "stop"  # as where a token ended it
    assert looked_at(events[:-1]) == ids[:-1]


def test_reasoning_comes_apart(client: openai.OpenAI) -> None:
    answer = ask(client, extra_body={"finemoe": {"regex": "<think>[a-c]{3}</think>[d-f]{4}"}})
    message = answer.choices[0].message
    assert set(message.reasoning_content) <= set("abc")
    assert set(message.content) <= set("def")
    begun = ask(
        client,
        extra_body={
            "finemoe": {"regex": "[a-c]{3}</think>[d-f]{4}"},
            "chat_template_kwargs": {"enable_thinking": True},
        },
    )
    assert set(begun.choices[0].message.reasoning_content) <= set("abc")


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "far": {"type": "boolean"}},
        "required": ["city", "far"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = ask(client, response_format=form, seed=seed, max_completion_tokens=80)
        found = json.loads(answer.choices[0].message.content)
        assert found["city"] in ("Ulm", "Bonn")
        assert isinstance(found["far"], bool)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(client: openai.OpenAI, stream: bool) -> None:
    more = {"tools": TOOLS, "extra_body": {"finemoe": {"choice": [f"Well.\n{CALL}"]}}, "max_completion_tokens": 90}
    if stream:
        own = gather(ask(client, **more, stream=True))[0]
        calls, content, reason = own["calls"], own["content"], own["reason"]
    else:
        choice = ask(client, **more).choices[0]
        calls, content, reason = choice.message.tool_calls, choice.message.content, choice.finish_reason
    assert (content, reason) == ("Well.", "tool_calls")
    (call,) = calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Ulm"},
    )
    asked = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    again = ask(client, messages=turns, tools=TOOLS)
    assert again.usage.prompt_tokens > ask(client).usage.prompt_tokens
    told = ask(client, tools=TOOLS, tool_choice="none", extra_body=more["extra_body"], max_completion_tokens=90)
    assert told.choices[0].message.content == f"Well.\n{CALL}"


def test_equal_seeds_give_equal_text_and_others_do_not(client: openai.OpenAI) -> None:
    texts = {seed: ask(client, seed=seed, max_completion_tokens=30).choices[0].message.content for seed in (1, 2, 3)}
    assert ask(client, seed=2, max_completion_tokens=30).choices[0].message.content == texts[2]
    assert len(set(texts.values())) == 3
    free = {ask(client, seed=None, max_completion_tokens=30).choices[0].message.content for _ in range(3)}
    assert len(free) > 1


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a field nobody knows": ({"extra_body": {"best_of": 2}}, "best_of"),
    "audio": ({"extra_body": {"modalities": ["audio"]}}, "modalities"),
    "a forced function": ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    "a hot temperature": ({"temperature": 2.5}, "temperature"),
    "truth for a number": ({"temperature": True}, "temperature"),
    "an empty stop": ({"stop": [""]}, "stop"),
    "alternatives without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "no messages": ({"messages": []}, "messages"),
    "too long an answer": ({"max_completion_tokens": 129}, "max_tokens"),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
        "",
    ),
    "our field misspelt": ({"extra_body": {"finemoe": {"topk": 3}}}, "finemoe.topk"),
    "both names of one limit": ({"max_tokens": 3}, "max_tokens"),
}


@pytest.mark.parametrize(("more", "names"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, more: dict[str, Any], names: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **more)
    body: Any = refused.value.body
    assert names in body["message"]
    assert body["type"] == "invalid_request_error"


def test_other_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean `talker`"):
        ask(client, model="talkr")
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        ask(client, model="writer")
    with pytest.raises(openai.BadRequestError, match="shorten") as refused:
        ask(client, messages=[{"role": "user", "content": "word " * 400}])
    assert refused.value.code == "context_length_exceeded"


def test_a_third_turn(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(3):
        messages.append({"role": "user", "content": f"Turn {turn}"})
        messages.append({"role": "assistant", "content": ask(client, messages=messages).choices[0].message.content})
    assert len(messages) == 7


def test_a_reader_who_goes_frees_what_it_held(
    live: Live, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.wait_until_idle("talker")
    engine, passes = live.engine("talker"), []
    ordinary = engine.step
    monkeypatch.setattr(engine, "step", lambda: passes.append(time.sleep(0.02)) or ordinary())  # as a large model
    for _ in range(3):
        stream = ask(client, stream=True, max_completion_tokens=128, extra_body={"finemoe": {"ignore_end": True}})
        next(iter(stream))
        stream.close()
        live.wait_until_idle("talker")
    assert engine.blocks_used == 0
    assert len(passes) < 3 * 128 / 2  # a few each, and not all that were asked for
