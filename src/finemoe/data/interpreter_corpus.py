"""A corpus with domains that a person can read, made of what every Python has: nothing is downloaded.

Code without its comments, English prose, arithmetic, names of characters and calendars differ so plainly that the cards
of a small mixture's experts show it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import random
import re
import sysconfig
import unicodedata
import warnings
from calendar import monthcalendar
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finemoe.core.config import Config
from finemoe.core.errors import DataError
from finemoe.data.documents.document import Document, SkipReport, hash_order
from finemoe.data.documents.formats import no_records

_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_LINES = 60
"""Of a generated document: so short that every domain has some on the validation side."""
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
Texts = Iterator[tuple[str, str]]
"""A document's name within its domain, and its text."""


class InterpreterCorpus(Config):
    """What the running Python knows, in five domains: code, English, arithmetic, characters, calendar."""

    kind: Literal["interpreter"] = "interpreter"
    max_bytes: Annotated[int, Field(ge=20_000)] = 1_800_000
    """[bytes] At most so many bytes of code and of English; of the others half, as digits and capitals make more
    tokens."""

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """Domain by domain; the same version of Python gives the same documents.

        Raises:
            DataError: the standard library is not here as text, or records are asked for.
        """
        no_records(self.kind, whole)
        yield from _documents(self.max_bytes)

    def validation_documents(self, report: SkipReport, whole: bool = False) -> None:
        """A share of `documents` is set aside."""


@functools.lru_cache(maxsize=1)  # a corpus is read three times in a row: to hash it, for its tokenizer, for its tokens
def _documents(max_bytes: int) -> tuple[Document, ...]:
    code, english = _library(max_bytes)
    half = max_bytes // 2
    domains = {
        "code": (max_bytes, code),
        "english": (max_bytes, english),
        "arithmetic": (half, _arithmetic()),
        "characters": (half, _characters()),
        "calendar": (half, _years()),
    }
    return tuple(
        Document(f"{domain}/{name}", domain, text)
        for domain, (most, texts) in domains.items()
        for name, text in _at_most(most, texts)
    )


def _at_most(max_bytes: int, texts: Iterable[tuple[str, str]]) -> Texts:
    total = 0
    for name, text in texts:
        total += len(text.encode())
        if total > max_bytes:
            return
        yield name, text


# ---- code and English, of the standard library ----


def _library(max_bytes: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Code and English of enough modules for `max_bytes` of each, drawn evenly over the library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    code: list[tuple[str, str]] = []
    english = [(f"help/{name}", text) for name, text in _manual()]
    sizes = [0, sum(len(text) for _, text in english)]
    for name in hash_order("interpreter", _names(root)):
        if min(sizes) > max_bytes:
            break
        try:
            with warnings.catch_warnings():  # what is odd in the library's own text is nobody's concern here
                warnings.simplefilter("ignore")
                tree = ast.parse((root / name).read_bytes())
        except (OSError, SyntaxError, ValueError):  # templates and deliberate mistakes lie there too
            continue
        prose = "\n\n".join(_without_docstrings(tree))
        for texts, number, text in ((english, 1, prose), (code, 0, "" if sizes[0] > max_bytes else ast.unparse(tree))):
            if text:
                texts.append((name, f"{text}\n"))
                sizes[number] += len(text)
    if not code:
        raise DataError(f"{root}: the standard library has no .py files here; use a corpus of kind `files`")
    return code, english


def _names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in files:
            if name.endswith(".py"):
                yield (Path(folder).relative_to(root) / name).as_posix()


def _without_docstrings(tree: ast.Module) -> Iterator[str]:
    """Take every docstring out of `tree`; their paragraphs of prose. The parser left the comments out already."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                node.body = node.body[1:] or [ast.Pass()]
                yield from _prose(text)


def _manual() -> Texts:
    """The language's manual, as far as `help()` has it; some distributions leave it out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        if text := "\n\n".join(_prose(topics[name])):
            yield name, f"{text}\n"


def _prose(text: str) -> Iterator[str]:
    """Paragraphs that are whole sentences: no signatures, sessions, tables or headings."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        words = paragraph.split()
        letters = sum(character.isalpha() or character.isspace() for character in paragraph)
        plain = letters > 0.85 * len(paragraph) and ">>>" not in paragraph
        if len(words) >= 8 and plain and words[0][0].isalpha() and words[-1][-1] in ".:!?":
            yield " ".join(words)


# ---- what is made ----


def _arithmetic() -> Texts:
    """Sheets of sums, differences, products and quotients, all whole and all right."""
    number = 0
    while True:
        draw = random.Random(f"arithmetic/{number}").randrange
        lines = []
        for _ in range(_LINES):
            a, b, c, d = draw(1000), draw(1000), draw(2, 100), draw(2, 100)
            choices = (f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", f"{c} * {d} = {c * d}", f"{c * d} / {d} = {c}")
            lines.append(choices[draw(4)])
        yield f"sheet-{number}", "\n".join(lines) + "\n"
        number += 1


def _characters() -> Texts:
    """Pages of Unicode's character names, in its order; those that are numbered and not named are left out."""
    lines: list[str] = []
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ", "VARIATION ")):
            lines.append(f"U+{code:04X} {name}")
        if len(lines) == _LINES:
            yield f"to-{code:04X}", "\n".join(lines) + "\n"
            lines.clear()


def _years() -> Texts:
    """Months as a wall calendar prints them, each with some of its days in words."""
    for year in range(1583, 9999):  # the first whole year of this calendar
        for month, name in enumerate(_MONTHS, start=1):
            lines = [f"{name} {year}".center(20).rstrip(), " ".join(day[:2] for day in _DAYS)]
            lines += [" ".join(f"{day or '':>2}" for day in week).rstrip() for week in monthcalendar(year, month)]
            draw = random.Random(f"calendar/{year}/{month}").randrange
            for day in sorted({draw(1, 29) for _ in range(6)}):
                on = date(year, month, day)
                lines.append(
                    f"{on.isoformat()} is {_DAYS[on.weekday()]}, {day} {name} {year}, week {on.isocalendar().week}."
                )
            yield f"{year}-{month:02}", "\n".join(lines) + "\n"
