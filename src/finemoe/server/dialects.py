"""How families write reasoning and tool calls into their text, and taking it apart while it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

THINK, THOUGHT = "<think>", "</think>"
Kind = Literal["content", "reasoning", "call"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer."""

    kind: Kind
    text: str
    """Of a call: its arguments, JSON."""
    name: str = ""
    """Of a call: the function."""


@dataclass(frozen=True)
class Marks:
    """How a family writes a call."""

    begin: str
    end: str | None
    """None: the call goes to the end of the answer."""
    around: tuple[str, ...] = ()
    """Marks before the first call and behind the last, which say nothing."""


TOOLS: Mapping[str, Marks] = {
    # Qwen 2.5 and 3, Hermes: {"name": ..., "arguments": {...}} between two tags.
    "hermes": Marks("<tool_call>", "</tool_call>"),
    # DeepSeek-V3 and R1: type, mark, name, arguments fenced as JSON; V3.1: name, mark, arguments.
    "deepseek": Marks(
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    ),
    # Mistral: a list of calls.
    "mistral": Marks("[TOOL_CALLS]", None),
}
"""By the name of the format."""
_SEPARATOR = "<｜tool▁sep｜>"
_FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class Dialect:
    """What a model's template tells of its answers."""

    reasoning: bool = False
    """It thinks between `<think>` and `</think>`."""
    tools: str | None = None
    """Which of TOOLS it calls in; None: its template knows no tools, or calls that we cannot read."""

    @staticmethod
    def of(sources: Sequence[str]) -> Dialect:
        """From the sources of a chat template."""
        text = "\n".join(sources)
        known = [name for name, marks in TOOLS.items() if marks.begin in text and "tools" in text]
        return Dialect(THOUGHT in text, known[0] if known else None)


class Splitter:
    """An answer, taken apart as it comes: what it has given out is never taken back."""

    def __init__(self, dialect: Dialect, *, tools: bool, thinking: bool) -> None:
        """Begin an answer.

        Args:
            dialect: of the model.
            tools: whether it was given tools; else the marks of calls are text.
            thinking: the prompt ended within a thought.
        """
        self._reasoning = dialect.reasoning
        self._marks = TOOLS[dialect.tools] if tools and dialect.tools is not None else None
        self._state: Kind = "reasoning" if thinking and dialect.reasoning else "content"
        self._held = ""
        self._blank = True
        """Nothing but white space so far, where an answer or a thought begins."""

    def push(self, text: str) -> list[Part]:
        """What `text` makes certain."""
        self._held += text
        return list(self._certain(last=False))

    def finish(self) -> list[Part]:
        """What is left."""
        return list(self._certain(last=True))

    def _certain(self, last: bool) -> Iterator[Part]:
        while True:
            marks = self._next_marks()
            found = [(self._held.find(mark), mark) for mark in marks if mark in self._held]
            if not found:
                break
            place, mark = min(found)
            yield from self._take(self._held[:place], mark)
            self._held = self._held[place + len(mark) :]
        if last:
            yield from self._rest()
        elif self._state != "call":
            keep = max((n for mark in marks for n in range(1, len(mark)) if self._held.endswith(mark[:n])), default=0)
            whole = self._held[: len(self._held) - keep]
            if marks:  # line breaks before a mark say nothing
                whole = whole.rstrip("\n")
            self._held = self._held[len(whole) :]
            yield from self._said(whole)

    def _next_marks(self) -> list[str]:
        """What may end the state that the answer is in."""
        if self._state == "call":
            assert self._marks is not None
            return [] if self._marks.end is None else [self._marks.end]
        marks = [THOUGHT] if self._state == "reasoning" else [THINK] if self._reasoning else []
        if self._marks is not None and self._state == "content":
            marks += [self._marks.begin, *self._marks.around]
        return marks

    def _take(self, before: str, mark: str) -> Iterator[Part]:
        """What stands before a mark, and the state behind it."""
        if self._state == "call":
            assert self._marks is not None
            yield from _calls(before) or [Part("content", f"{self._marks.begin}{before}{mark}")]
            self._state, self._blank = "content", True
            return
        if self._marks is not None and mark in (self._marks.begin, *self._marks.around):
            yield from self._said(before.rstrip("\n") if mark == self._marks.begin else before)
            self._state = "call" if mark == self._marks.begin else "content"
            return
        yield from self._said(before.rstrip("\n") if mark == THOUGHT else before)
        self._state, self._blank = ("content" if mark == THOUGHT else "reasoning"), True

    def _said(self, text: str) -> Iterator[Part]:
        """Text of the state; line breaks that only set marks apart are left out."""
        if self._blank and (self._reasoning or self._marks is not None):
            text = text.lstrip("\n")
        if text:
            self._blank = False
            yield Part(self._state, text)

    def _rest(self) -> Iterator[Part]:
        rest, self._held = self._held, ""
        if self._state != "call":
            yield from self._said(rest)
            return
        assert self._marks is not None
        calls = _calls(rest) if self._marks.end is None else []
        yield from calls or [Part("content", self._marks.begin + rest)]  # cut short: shown as it is


def _calls(text: str) -> list[Part]:
    """The calls that stand in `text`; none where it is not one."""
    if _SEPARATOR in text:
        head, body = text.split(_SEPARATOR, 1)
        if head.strip() == "function":  # the name, and the arguments in a fence
            name, _, body = body.partition("\n")
        else:
            name = head
        fenced = _FENCED.fullmatch(body)
        return _call(name.strip(), fenced[1] if fenced else body)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # a model may write brackets without end
        return []
    calls = found if isinstance(found, list) else [found]
    parts: list[Part] = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        given: Any = call.get("arguments", call.get("parameters", {}))
        parts += _call(call["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
    return parts


def _call(name: str, arguments: str) -> list[Part]:
    try:
        whole = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        whole = False
    return [Part("call", arguments.strip(), name)] if whole and name else []
