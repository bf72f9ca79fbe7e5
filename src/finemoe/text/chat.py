"""Chat templates: messages to the text that a model was trained to continue."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, final

from finemoe.core.child import ask, end
from finemoe.core.errors import DataError
from finemoe.core.logs import logger
from finemoe.text.files import COMPANIONS, MEGABYTE, leads_out, read_beside, read_table, template_problem
from finemoe.text.settings import TOKENIZER_CONFIG, special_tokens_of, with_older_tokens

CHAT_TEMPLATE = "chat_template.jinja"
DEFAULT, TOOL_USE = "default", "tool_use"

_PLAIN = """\
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{ "Assistant:\\n" }}{% generation %}{{ message.content + END }}{% endgeneration %}
{%- else -%}
{{ message.role | capitalize }}:{{ "\\n" + message.content + "\\n\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "Assistant:\\n" }}
{%- endif -%}
"""
_SOURCE_LIMIT = MEGABYTE
_MOST_CHARS = 16 * MEGABYTE
_MEMORY = 1024 * MEGABYTE
_MOST_MESSAGES = 25_000  # that one request renders, where it can be divided


@final
class Renderer:
    """The process that has a copy of itself render each template. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: str, seconds: float) -> dict[str, Any] | None:
        """What `rendering.py` answers; None where nothing comes in time."""
        with self._lock:
            until = time.monotonic() + seconds
            answer = self._ask(request, seconds)
            if answer is None and time.monotonic() < until:  # it had died, which says nothing of this template
                answer = self._ask(request, seconds)
            return answer

    def close(self) -> None:
        """End it; the next request starts another."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                end(process)

    def _ask(self, request: str, seconds: float) -> dict[str, Any] | None:
        process, answer = self._running(), None
        try:
            answer = ask(process, request, seconds)
        finally:  # an interrupt, too, leaves an answer behind that belongs to this request
            if answer is None:
                self._process = None
                end(process)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            end(self._process)  # it died; its pipes are still open
            self._process = None
        if self._process is None:
            script = Path(__file__).with_name("rendering.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process


@cache
def _renderer() -> Renderer:
    """That of this process, which ends with it."""
    made = Renderer()
    atexit.register(made.close)
    return made


os.register_at_fork(after_in_child=_renderer.cache_clear)  # the process, and a lock that may be held, are the parent's


@dataclass(frozen=True)
class Written:
    """What a template made of a conversation."""

    text: str
    lengths: tuple[int, ...]
    """Of what it makes of each beginning that was asked for; -1 where `text` does not begin so."""


@final
@dataclass(frozen=True)
class ChatTemplate:
    """A model's template, rendered in a sandbox inside a confined process: it may be anybody's program."""

    sources: Mapping[str, str]
    """jinja2 source by name; `default` is used, or `tool_use` when there are tools."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """What `bos_token`, `eos_token` ... are in a template."""
    origin: str = "chat template"
    """Names it in errors."""
    seconds: float = 10.0
    """A rendering that takes longer is given up."""

    @staticmethod
    def of(source: str, special_tokens: Mapping[str, str] | None = None, origin: str = "chat template") -> ChatTemplate:
        """A single template, as GGUF files hold it.

        Raises:
            DataError: it is too long.
        """
        return ChatTemplate({DEFAULT: _checked(source, origin)}, special_tokens or {}, origin)

    @staticmethod
    def plain(end: str) -> ChatTemplate:
        """The simplest there is: who speaks, on a line, then what; an answer ends with the token called `end`."""
        return ChatTemplate.of(_PLAIN.replace("END", json.dumps(end)), origin="the plain template")

    @staticmethod
    def from_config(config: Mapping[str, Any], origin: str, jinja: str | None = None) -> ChatTemplate | None:
        """The template of a tokenizer_config.json, or `jinja` in its place; None: there is neither.

        Raises:
            DataError: `chat_template` is neither a text nor a list of named ones; or is too long.
        """
        tokens = special_tokens_of(config, origin)
        value = config.get("chat_template")
        if jinja is not None:
            named = _named(value, origin) if isinstance(value, list) else {}
            return ChatTemplate({**named, DEFAULT: _checked(jinja, origin)}, tokens, origin)
        if value is None:
            return None
        sources = {DEFAULT: value} if isinstance(value, str) else _named(value, origin)
        if not sources:
            raise DataError(f"{origin}: chat_template is empty: leave it out, or write one")
        return ChatTemplate({name: _checked(text, origin) for name, text in sources.items()}, tokens, origin)

    @staticmethod
    def load(folder: str | Path) -> ChatTemplate | None:
        """From chat_template.jinja or tokenizer_config.json in `folder`; None: no template there.

        A file that cannot be read, or is no template, is left out with a warning.

        Raises:
            DataError: a `chat_template` that is neither text nor named texts, or a link that leads out of the folder.
        """
        folder = Path(folder)
        config = read_table(folder, TOKENIZER_CONFIG)
        jinja = _beside(folder)
        name = TOKENIZER_CONFIG if jinja is None else CHAT_TEMPLATE
        config = with_older_tokens(folder, config)
        return ChatTemplate.from_config(config, f"chat template of {folder / name}", jinja)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`, each {"role": ..., "content": ...}.

        Args:
            messages: plain JSON values throughout.
            add_generation_prompt: end with what makes the model answer.
            tools: JSON schemas that the template may list.
            variables: anything else a template asks for.

        Raises:
            DataError: a malformed message, or a template that fails, refuses, writes without end or takes too
                long; with its line where there is one.
        """
        return self.render_all([messages], add_generation_prompt, tools, **variables)[0]

    def render_all(
        self,
        conversations: Iterable[Sequence[Mapping[str, Any]]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        marks: Sequence[str] = (),
        **variables: Any,
    ) -> list[str]:
        """`render` for many conversations in one process.

        `marks`: two characters, to stand around what the template says the assistant wrote (`{% generation %}`).

        Raises:
            DataError: as `render`.
        """
        tables = [self._table(messages, add_generation_prompt, tools, variables) for messages in conversations]
        return [one.text for one in self._written(tables, [()] * len(tables), tools is not None, marks)]

    def render_beginnings(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        beginnings: Sequence[Sequence[tuple[int, bool]]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        marks: Sequence[str] = (),
        **variables: Any,
    ) -> list[Written]:
        """`render_all`, and of each conversation how its text begins.

        Every beginning is rendered by itself, some at a time, so that a conversation of a thousand messages takes
        neither more memory nor more time at once than others.

        Args:
            conversations, tools, marks, variables: as in `render_all`.
            beginnings: of each conversation: of how many messages, and whether with what makes the model answer.

        Raises:
            DataError: as `render_all`; or the template writes one conversation in two ways.
        """
        tables = [self._table(messages, False, tools, variables) for messages in conversations]
        found: dict[int, Written] = {}
        for group in _groups([len(one["messages"]) for one in tables], beginnings):
            here = [tables[number] for number, _ in group], [upto for _, upto in group]
            for (number, _), one in zip(group, self._written(*here, tools is not None, marks), strict=True):
                known = found.get(number, Written(one.text, ()))
                if known.text != one.text:
                    raise DataError(f"{self.origin}: writes the same conversation now in one way and now in another")
                found[number] = Written(one.text, known.lengths + one.lengths)
        return [found[number] for number in range(len(tables))]

    def _table(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What a template sees of one conversation."""
        return {
            **self.special_tokens,
            "tools": None if tools is None else list(tools),
            "documents": None,
            **variables,
            "messages": [_message(message, at) for at, message in enumerate(messages, 1)],
            "add_generation_prompt": add_generation_prompt,
        }

    def _written(
        self,
        tables: Sequence[Mapping[str, Any]],
        beginnings: Sequence[Sequence[tuple[int, bool]]],
        has_tools: bool,
        marks: Sequence[str],
    ) -> list[Written]:
        """One request, and its answer."""
        request = {
            "source": self._source(has_tools),
            "conversations": tables,
            "beginnings": beginnings,
            "most_chars": _MOST_CHARS,
            "marks": list(marks),
            "seconds": self.seconds,
            "memory": _MEMORY,
        }
        answer = self._answer(request)
        if "texts" in answer:
            return [Written(str(text), tuple(lengths))
                    for text, lengths in zip(answer["texts"], answer["lengths"], strict=True)]  # fmt: skip
        where = f", line {answer['line']}" if answer["line"] else ""
        raise DataError(f"{self.origin}{where}: {answer['message']}")

    def says_who_wrote(self, has_tools: bool) -> bool:
        """Whether it says itself what the assistant wrote."""
        return re.search(r"\{%-?\s*generation\b", self._source(has_tools)) is not None

    def mentions(self, word: str, has_tools: bool) -> bool:
        """Whether it can write what a message or a call has under that name."""
        return re.search(rf"\b{re.escape(word)}\b", self._source(has_tools)) is not None

    def _source(self, has_tools: bool) -> str:
        wanted = TOOL_USE if has_tools and TOOL_USE in self.sources else DEFAULT
        if wanted not in self.sources:
            raise DataError(f"{self.origin}: none of its templates is called {DEFAULT!r}: {', '.join(self.sources)}")
        return self.sources[wanted]

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send `request` to a process of its own."""
        try:
            text = json.dumps(request, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.origin}: messages, tools and variables must be plain JSON: {error}") from error
        answer = _renderer().render(text, self.seconds + 60)
        if answer is None or answer.get("status") == -signal.SIGALRM:
            raise self._too_long()
        if "status" in answer:
            raise DataError(
                f"{self.origin}: broke off while rendering (status {answer['status']}): use another template"
            )
        return answer

    def _too_long(self) -> DataError:
        return DataError(f"{self.origin}: takes longer than {self.seconds:g} s: does it loop without end?")


def _groups(
    sizes: Sequence[int], beginnings: Sequence[Sequence[tuple[int, bool]]]
) -> Iterator[list[tuple[int, list[tuple[int, bool]]]]]:
    """Conversations by number, each with some of its beginnings: about so many messages that one request renders."""
    group: list[tuple[int, list[tuple[int, bool]]]] = []
    work = 0
    for number, (size, upto) in enumerate(zip(sizes, beginnings, strict=True)):
        group.append((number, []))
        work += size
        for one in upto:
            if work + one[0] > _MOST_MESSAGES and work > size:
                yield group
                group, work = [(number, [])], size
            group[-1][1].append(one)
            work += one[0]
    if group:
        yield group


def _beside(folder: Path) -> str | None:
    """chat_template.jinja in `folder`; None: there is none, or, with a warning, none that is a template."""
    try:
        text = read_beside(folder, CHAT_TEMPLATE, _SOURCE_LIMIT, "chat template")
        problem = None if text is None else template_problem(text.encode("utf-8", "replace"))
        if problem is not None:
            raise DataError(f"chat template {folder / CHAT_TEMPLATE}: it {problem}")
    except DataError as error:
        if leads_out(folder, CHAT_TEMPLATE):
            raise
        logger.warning("%s; left out: %s", error, COMPANIONS[CHAT_TEMPLATE])
        return None
    return text


def _checked(source: str, origin: str) -> str:
    if len(source) > _SOURCE_LIMIT:
        raise DataError(f"{origin}: {len(source)} characters are more than the {_SOURCE_LIMIT} allowed")
    return source


def _named(value: Any, origin: str) -> dict[str, str]:
    """[{"name": ..., "template": ...}] as a table."""
    sources = {}
    for entry in value if isinstance(value, list) else [None]:
        pair = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        name, template = pair
        if not isinstance(name, str) or not isinstance(template, str):
            raise DataError(f'{origin}: chat_template must be text, or a list of {{"name": ..., "template": ...}}')
        sources[name] = template
    return sources


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """`message`, checked: a role, and content that is text, a list of parts, or left out beside tool calls."""
    if not isinstance(message, Mapping):
        raise DataError(f'message {number} is a {type(message).__name__}, but must be {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"message {number}: role is {role!r}, but must be text such as 'user'")
    parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    if not (isinstance(content, str) or parts or (content is None and message.get("tool_calls"))):
        raise DataError(f"message {number}: content is {content!r}, but must be text")
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"message {number} is not valid Unicode: {error.reason}") from error
    return dict(message)
