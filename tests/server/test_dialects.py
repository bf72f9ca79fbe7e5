"""Reasoning and tool calls, taken out of a text as it comes."""

from __future__ import annotations

import json

import pytest

from finemoe.server.dialects import Dialect, Part, Splitter

HERMES = "template with tools <tool_call> and </think>"
DEEPSEEK = "tools <｜tool▁calls▁begin｜><｜tool▁call▁begin｜> </think>"
MISTRAL = "tools [TOOL_CALLS]"


def split(text: str, pieces: list[str], template: str, *, tools: bool = True, thinking: bool = False) -> list[Part]:
    assert "".join(pieces) == text
    splitter = Splitter(Dialect.of([template]), tools=tools, thinking=thinking)
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    joined: list[Part] = []
    for part in parts:
        if part.kind != "call" and joined and joined[-1].kind == part.kind:
            joined[-1] = Part(part.kind, joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


CASES = {
    "plain": ("Hello < world <thin", HERMES, False, [Part("content", "Hello < world <thin")]),
    "a thought": (
        "<think>\nWell, 2 < 3.\n</think>\n\nYes.",
        HERMES,
        False,
        [Part("reasoning", "Well, 2 < 3."), Part("content", "Yes.")],
    ),
    "a thought that the prompt began": (
        "Well.</think>Yes.",
        HERMES,
        True,
        [Part("reasoning", "Well."), Part("content", "Yes.")],
    ),
    "a thought without end": ("Well, I", HERMES, True, [Part("reasoning", "Well, I")]),
    "a call": (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
        HERMES,
        False,
        [Part("content", "I look."), Part("call", '{"city": "Ulm"}', "weather")],
    ),
    "two calls": (
        '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "b", "arguments": {"x": 1}}</tool_call>',
        HERMES,
        False,
        [Part("call", "{}", "a"), Part("call", '{"x": 1}', "b")],
    ),
    "no JSON": (
        "<tool_call>weather(Ulm)</tool_call>",
        HERMES,
        False,
        [Part("content", "<tool_call>weather(Ulm)</tool_call>")],
    ),
    "a call cut short": ('<tool_call>{"name": "we', HERMES, False, [Part("content", '<tool_call>{"name": "we')]),
    "DeepSeek-V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Ulm"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        DEEPSEEK,
        False,
        [Part("call", '{"city": "Ulm"}', "weather")],
    ),
    "DeepSeek-V3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Ulm"}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        DEEPSEEK,
        False,
        [Part("call", '{"city": "Ulm"}', "weather")],
    ),
    "Mistral": (
        '[TOOL_CALLS] [{"name": "a", "arguments": {"x": "é"}}, {"name": "b", "arguments": {}}]',
        MISTRAL,
        False,
        [Part("call", '{"x": "é"}', "a"), Part("call", "{}", "b")],
    ),
}


@pytest.mark.parametrize(("text", "template", "thinking", "expected"), CASES.values(), ids=CASES)
def test_every_cut_gives_the_same_parts(text: str, template: str, thinking: bool, expected: list[Part]) -> None:
    assert split(text, [text], template, thinking=thinking) == expected
    assert split(text, list(text), template, thinking=thinking) == expected
    for place in range(len(text)):
        assert split(text, [text[:place], text[place:]], template, thinking=thinking) == expected


def test_what_was_given_out_is_never_taken_back() -> None:
    splitter = Splitter(Dialect.of([HERMES]), tools=True, thinking=False)
    assert splitter.push("so <tool") == [Part("content", "so ")]
    assert splitter.push("box>") == [Part("content", "<toolbox>")]


def test_marks_are_text_without_tools_or_thoughts() -> None:
    text = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert split(text, [text], HERMES, tools=False) == [Part("content", text)]
    thought = "<think>x</think>"
    assert split(thought, [thought], "no such thing") == [Part("content", thought)]


def test_templates_tell_their_dialect() -> None:
    assert Dialect.of([HERMES]) == Dialect(True, "hermes")
    assert Dialect.of([DEEPSEEK]) == Dialect(True, "deepseek")
    assert Dialect.of([MISTRAL]) == Dialect(False, "mistral")
    assert Dialect.of(["{{ messages }}"]) == Dialect()
    assert Dialect.of([]) == Dialect()


def test_arguments_are_json() -> None:
    text = '[TOOL_CALLS][{"name": "a", "parameters": {"x": [1, null]}}]'
    (call,) = split(text, [text], MISTRAL)
    assert json.loads(call.text) == {"x": [1, None]}
