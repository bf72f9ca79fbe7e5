"""Chat templates against transformers, and against templates that mean harm."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import DataError
from finemoe.text import ChatTemplate, chat

TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  One & <two>?\n"},
    {"role": "assistant", "content": "<think>hm</think>Three."},
    {"role": "user", "content": "{{ 7 * 6 }} 床前"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"é": [1, 2.5, None, True]}}}]

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{% endif %}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', first=true) %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system ~ ('' if ns.first else '\\n\\n') ~ message['content'] %}
    {%- set ns.first = false %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' -%}
        <｜User｜>{{ message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['tool_calls'] is defined %}
            {%- for call in message['tool_calls'] %}
                {{- '<｜call｜>' + call['name'] + call['arguments'] | tojson }}
            {%- endfor %}
        {%- else %}
            {%- generation %}<｜Assistant｜>{{ message['content'].split('</think>')[-1] }}{% endgeneration %}
            {{- eos_token }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{% endif %}"""

LLAMA = """{{- bos_token }}
{%- if custom is defined %}
    {%- set tools = custom %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

{% if tools is not none %}
Tools: {{ tools | length }}
    {% for tool in tools %}
{{ tool | tojson(indent=4) }}
    {% endfor %}
{% endif %}
{{ system_message }}<|eot_id|>
{%- macro turn(role, text) %}<|start_header_id|>{{ role }}<|end_header_id|>

{{ text | trim }}<|eot_id|>{% endmacro %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('only user and assistant may speak, not ' ~ message.role) }}
    {%- endif %}
    {%- if loop.index > 100 %}{% break %}{% endif %}
    {{- turn(message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ turn('assistant', '') }}{% endif %}"""

FEATURES = """{# a comment #}
{% for key, value in messages[0].items() %}{{ loop.index0 }}{{ key }}={{ value | upper }};{% endfor %}
{{ messages | map(attribute='role') | unique | join(',') }}|{{ messages | selectattr('role', 'equalto', 'user') | list
| length }}|{{ dict(a=1).a }}|{{ 'x' if missing is defined else missing }}|{{ '%s-%05.2f' % ('a', 1.5) }}|
{%- for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}
{{ ['a', 'b'] | tojson }} {{ messages[-1]['content'].startswith('{{') }} {{ "a\\tb" }} {{ 7 // 2 }} {{ 'Aé' | tojson }}
"""


@pytest.fixture(scope="module")
def witness() -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **TOKENS)


CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"é": 1}}]},
]


@pytest.mark.parametrize("source", [CHATML, DEEPSEEK, LLAMA, FEATURES], ids=["chatml", "deepseek", "llama", "features"])
def test_a_template_renders_as_in_transformers(witness: Any, source: str) -> None:
    template = ChatTemplate.of(source, TOKENS)
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (TALK, {"add_generation_prompt": True}),
        (TALK[1:2], {}),
        (TALK, {"tools": TOOLS, "add_generation_prompt": True}),
    ]
    if source == DEEPSEEK:
        cases.append((CALLS, {}))
    for messages, options in cases:
        expected = witness.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
        assert template.render(messages, **options) == expected
        assert len(expected) > 20


def test_many_conversations_render_as_one_by_one() -> None:
    template = ChatTemplate.of(CHATML, TOKENS)
    talks = [TALK[: at + 1] for at in range(len(TALK))]
    assert template.render_all(talks, True) == [template.render(talk, True) for talk in talks]
    assert template.render_all([]) == []


def test_variables_and_the_clock_reach_the_template() -> None:
    template = ChatTemplate.of("{{ mood }} {{ strftime_now('%Y') | length }} {{ bos_token }}", {"bos_token": "<s>"})
    assert template.render(TALK, mood="calm") == "calm 4 <s>"


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path) is None
    config["chat_template"] = "plain {{ bos_token }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert found.render(TALK) == "plain <s>"
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert (found.render(TALK), found.render(TALK, tools=TOOLS)) == ("d", "t")
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    found = ChatTemplate.load(str(tmp_path))
    assert found is not None
    assert found.render(TALK) == "file <s>"


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n", b"{{ \xff }}", b"", b"a\0b", b" " * (2 << 20)]
)
def test_a_file_that_is_no_template_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    assert ChatTemplate.load(tmp_path) is None
    assert f"{tmp_path / 'chat_template.jinja'}: " in caplog.text
    assert "left out: its chat template is lost" in caplog.text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "plain"}))
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.sources == {"default": "plain"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (7, "chat_template must be text, or a list"),
        ([{"name": "default"}], "chat_template must be text, or a list"),
        ([], "chat_template is empty"),
        ("x" * (2**20 + 1), "more than the 1048576 allowed"),
    ],
)
def test_a_malformed_template_entry_is_refused(value: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        ChatTemplate.from_config({"chat_template": value}, "here")


def test_a_list_without_a_default_is_refused() -> None:
    found = ChatTemplate.from_config({"chat_template": [{"name": "rag", "template": "r"}]}, "here")
    assert found is not None
    with pytest.raises(DataError, match="none of its templates is called 'default': rag"):
        found.render(TALK)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hello", "message 2 is a str"),
        ({"content": "x"}, "message 2: role is None"),
        ({"role": "user"}, "message 2: content is None"),
        ({"role": "user", "content": 7}, "message 2: content is 7"),
        ({"role": "user", "content": "\ud800"}, "message 2 is not valid Unicode"),
        ({"role": "user", "content": "x", "extra": {1, 2}}, "must be plain JSON"),
        ({"role": "user", "content": "x", "extra": float("nan")}, "must be plain JSON"),
    ],
)
def test_malformed_messages_are_refused(message: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        ChatTemplate.of(CHATML).render([TALK[0], message])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("one\n{% for %}", "line 2: "),
        ("one\ntwo\n{{ 1 / 0 }}", "line 3: division by zero"),
        ("{{ nothing.more }}", "line 1: 'nothing' is undefined"),
        ("\n{{ raise_exception('not so') }}", "line 2: not so"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    ],
)
def test_a_failing_template_is_named_with_its_line(source: str, says: str) -> None:
    with pytest.raises(DataError, match=rf"mine.*{says}"):
        ChatTemplate.of(source, origin="mine").render(TALK)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__ }}",
    "{{ self.__init__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.__init__ }}",
    "{{ namespace.__init__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_way_out_of_the_sandbox_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"out of bounds|rename it|no loader"):
        ChatTemplate.of(source).render(TALK)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
        ("{% for i in range(99999) %}{% for j in range(999) %}0123456789{% endfor %}{% endfor %}", "16777216 char"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ '%10000000000d' % 1 }}", "too much memory"),
        ("{{ 'a'.center(10 ** 10) }}", "too much memory"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too much memory|takes longer than",
        ),
        ("{{ 7 ** (7 ** (7 ** 7)) }}", "takes longer than"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
    ],
)
def test_a_template_without_measure_is_stopped(source: str, says: str) -> None:
    seconds = 0.5 if "longer" in says else 30.0  # a busy machine must not turn one refusal into another
    with pytest.raises(DataError, match=says):
        ChatTemplate({"default": source}, seconds=seconds).render(TALK)


def test_a_rendering_cannot_open_files() -> None:
    # idna is a codec that Python imports at need: the nearest thing to a file that a template can reach for.
    with pytest.raises(DataError, match="Too many open files"):
        ChatTemplate.of("{{ 'x'.encode('idna') }}").render(TALK)


def test_one_process_renders_many_and_another_takes_its_place() -> None:
    template = ChatTemplate.of("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": "one\ntwo"}]) == "one\ntwo"
    first = chat._renderer()._process
    assert first is not None
    with pytest.raises(DataError, match="takes longer than"):
        ChatTemplate({"default": ENDLESS}, seconds=0.2).render(TALK)
    texts = template.render_all([[{"role": "user", "content": str(number)}] for number in range(50)])
    assert texts == [str(number) for number in range(50)]
    assert chat._renderer()._process is first
    first.kill()
    assert template.render([{"role": "user", "content": "again"}]) == "again"


def test_threads_and_forks_get_their_own_answers() -> None:
    template = ChatTemplate.of("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda n: template.render([{"role": "user", "content": str(n)}]), range(64))
        assert list(found) == [str(number) for number in range(64)]
    child = os.fork()
    if not child:
        same = template.render([{"role": "user", "content": "child"}]) == "child"
        chat._renderer().close()
        os._exit(0 if same else 1)
    assert template.render([{"role": "user", "content": "parent"}]) == "parent"
    assert os.waitpid(child, 0)[1] == 0


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
