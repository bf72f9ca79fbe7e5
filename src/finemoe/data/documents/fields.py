"""Which of a record's fields make its text: one by name, or several joined by a template."""

from __future__ import annotations

import codecs
import json
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

_INDEX = re.compile(r"\[([^\]]*)\]")
_SHOWN = 8


class NoTextError(Exception):
    """A record without the text that was asked for; the message says why."""

    def __init__(self, message: str, absent: bool) -> None:
        super().__init__(message)
        self.absent = absent
        """The record has no such field at all: perhaps the wrong one was asked for."""


def _check_template(template: str) -> str:
    """A template is text with field names in braces; `{{` is a brace, `\\n` and `\\t` are a line end and a tab."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write it like `{{question}}\\n{{answer}}`, and a brace itself twice") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise ValueError("it names no field: write the names in braces, like `{question}\\n{answer}`")
    if not all(names):
        raise ValueError("`{}` names no field: write the names in the braces, like `{question}\\n{answer}`")
    if any(form or conversion for _, _, form, conversion in parts):
        raise ValueError("a field is written by its name alone, without `:` or `!`")
    return template


_NO_ORDER = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}  # told by a mark, and here there is none
_NO_PROSE = frozenset({"idna", "punycode"})  # of names in addresses


def _check_encoding(name: str) -> str:
    try:
        known = codecs.lookup(name).name
        if known in _NO_PROSE or "a".encode(known).decode(known) != "a":
            raise LookupError(name)
        return _NO_ORDER.get(known, known)
    except (LookupError, ValueError, TypeError) as error:
        raise ValueError("no encoding of text that Python knows; common ones are utf-8, utf-16-le, cp1252, gb18030, "
                         "shift_jis, koi8-r") from error  # fmt: skip


TemplateText = Annotated[str, AfterValidator(_check_template)]
EncodingName = Annotated[str, AfterValidator(_check_encoding)]


def require_one_way(text_field: str, template: str | None) -> None:
    """Refuse two ways to the same text.

    Raises:
        ValueError: both are given.
    """
    if template is not None and text_field != "text":
        raise ValueError("`template` and `text_field` both say what the text is: keep one of them")


class Fields(Protocol):
    """What of a record becomes a document."""

    @property
    def text_field(self) -> str:
        """The field that a text without a record stands for."""
        ...

    @property
    def template(self) -> str | None:
        """None: a text without a record is one."""
        ...

    @property
    def names(self) -> list[str]:
        """The fields that are asked for, in the order of the text; none: all that there are."""
        ...

    def columns(self, known: Iterable[str]) -> tuple[list[str], list[str]]:
        """The columns of a table to read, and the fields for which it has none."""
        ...

    def text_of(self, record: Mapping[str, Any]) -> str:
        """The text of a record.

        Raises:
            NoTextError: there is none.
        """
        ...


@dataclass(frozen=True)
class WholeRecord:
    """A record with all its fields, as JSON: for what is more than a text, as a conversation is."""

    text_field: str = "text"
    template: None = None

    @property
    def names(self) -> list[str]:
        """None is asked for by name."""
        return []

    def columns(self, known: Iterable[str]) -> tuple[list[str], list[str]]:
        """All of them."""
        return list(known), []

    def text_of(self, record: Mapping[str, Any]) -> str:
        """JSON on one line."""
        return json.dumps(record, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class TextFields:
    """How the text of a record is found."""

    text_field: str = "text"
    """The name of the field. One within another is written `outer.inner`, the n-th of a list, from 0, `list[n]`."""
    template: str | None = None
    """Text with such names in braces, to be filled in; in place of `text_field`."""

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        if self.template is None:
            return [("", self.text_field)]
        plain = self.template.replace("\\n", "\n").replace("\\t", "\t")
        return [(literal, name) for literal, name, _, _ in string.Formatter().parse(plain)]

    @property
    def names(self) -> list[str]:
        """The fields, in the order of the text."""
        return list(dict.fromkeys(name for _, name in self._parts if name is not None))

    def columns(self, known: Iterable[str]) -> tuple[list[str], list[str]]:
        """The columns of a table to read, and the fields for which it has none."""
        there = set(known)
        found: list[str] = []
        missing: list[str] = []
        for name in self.names:
            column = name if name in there else steps_of(name)[0]
            (found if column in there else missing).append(column if column in there else name)
        return list(dict.fromkeys(found)), missing

    def text_of(self, record: Mapping[str, Any]) -> str:
        """The text of a record; what the fields hold goes into it as it is, braces and all.

        Raises:
            NoTextError: a field is not there, or holds no text.
        """
        written = [(literal, "" if name is None else self._value(record, name)) for literal, name in self._parts]
        if not any(value for _, value in written):
            return ""  # a template without any filling
        return "".join(literal + value for literal, value in written)

    def _value(self, record: Mapping[str, Any], name: str) -> str:
        value = value_at(record, name)
        if isinstance(value, str):
            return value
        if value is ABSENT:
            raise NoTextError(f"no field `{name}` (it has {shown(record)})", absent=True)
        if self.template is not None and isinstance(value, (int, float)):
            return str(value)
        raise NoTextError(f"field `{name}` holds no text", absent=False)


ABSENT = object()
"""In place of a value that is not there."""
_LONGEST_NAME = 40


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, by its own name or by the steps to it; `ABSENT` where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for step in steps_of(name):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, (list, tuple)) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


def steps_of(name: str) -> list[str]:
    """`a.b[0]` as a, b, 0."""
    return _INDEX.sub(r".\1", name).split(".")


def shown(names: Iterable[str]) -> str:
    """Names for a message, the first few."""
    known = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names]
    return ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if known[_SHOWN:] else "") or "none"


def is_chat(value: Any) -> bool:
    """Whether a field holds the turns of a conversation."""
    turns = value if isinstance(value, (list, tuple)) and value else [None]
    return all(isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
               for turn in turns)  # fmt: skip
