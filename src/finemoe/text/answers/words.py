"""The one form of words, and the one splitter of lists, for answers that no paper prescribes a form for."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"'})
"""Typographic quotation marks and apostrophes to typed ones."""
_MARKS = ".,;:!?\"'`*…。，！？"
_ARTICLES = frozenset(("a", "an", "the"))
_INITIALS = re.compile(r"(?<!\w)(?:[^\W\d_]\.){2,}")  # U.S., p.m.
_AMPERSAND = re.compile(r"\s*\\?&\s*")
_HYPHEN = re.compile(r"(?<=[^\W\d_])[-‐‑](?=[^\W\d_])")


def word_form(text: str) -> str:
    """Words without what does not make them others: case, articles, the marks of a sentence, hyphens, quotes, blanks.

    Brackets stay, and so do marks within a word; a text that is nothing but articles and marks stays itself.
    """
    text = unicodedata.normalize("NFKC", text).translate(QUOTES).casefold()
    text = _INITIALS.sub(lambda found: found[0].replace(".", ""), _AMPERSAND.sub(" and ", text))
    words = [word.strip(_MARKS) for word in _HYPHEN.sub(" ", text).split()]
    kept = [word for word in words if word and word not in _ARTICLES]
    return " ".join(kept or [word for word in words if word] or text.split())


_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_RUN = re.compile(r"[\d,]*\d(?:\.\d+)?")
_WORD = r"(?:and/or|and(?: also)?|or(?: else)?|as well as)(?![^\W\d_])|\\?&"
_JOINED = re.compile(rf"\s*[,;]\s*(?:{_WORD})?\s*|\s*(?<![^\W\d_])(?:{_WORD})\s*", re.IGNORECASE)
_BEFORE = re.compile(r"\s*(?:both|either)\s+(?=.*(?:\band\b|\bor\b))", re.IGNORECASE | re.DOTALL)


def split_list(text: str) -> list[str]:
    """The parts of `3 and 5`, `2 or 3`, `1, 2, and 3`, `a; b`: what commas, semicolons and words part outside brackets.

    A comma within 1,234 parts nothing.
    """
    text = _BEFORE.sub("", text, count=1) if _BEFORE.match(text) else text
    return [part for part in split_outside(text, _JOINED) if part] or [text]


def split_outside(text: str, mark: re.Pattern[str], numbers: bool = True) -> list[str]:
    """Split at `mark` outside all brackets and, with `numbers`, outside those whose thousands have commas."""
    grouped = {
        place
        for run in _RUN.finditer(text)
        if numbers and _GROUPED.fullmatch(run[0])
        for place in range(run.start() + 1, run.end())
    }
    depth, cuts, at = 0, [(0, 0)], 0
    while at < len(text):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        elif depth == 0 and at not in grouped and (found := mark.match(text, at)) and found.end() > at:
            cuts.append((at, found.end()))
            at = found.end()
            continue
        at += 1
    return [text[start:end].strip() for (_, start), (end, _) in pairwise([*cuts, (len(text), 0)])]
