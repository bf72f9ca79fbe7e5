"""Whole numbers and simple fractions that are written as words: twenty-one, two hundred and five, one and a half."""

from __future__ import annotations

import re
from fractions import Fraction

_TO_NINETEEN = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = {word: value for value, word in enumerate(_TO_NINETEEN)}
_TEN = dict(zip(_TENS, range(20, 100, 10), strict=True))
_SCALES = {"trillion": 10**12, "billion": 10**9, "million": 10**6, "thousand": 10**3}
_PARTS = {
    **{name: part for part, names in enumerate((("half", "halves"), ("third", "thirds")), 2) for name in names},
    **{"quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6},
    **{"eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10},
}
_LONGEST = 24  # words
_AFTER_A_SCALE = re.compile(rf"\b({'|'.join(_SCALES)}),(?=\s)")
"""two million, three hundred; elsewhere a comma parts a list."""

Read = tuple[int, int]  # a value and the place of the word after it


def number_in_words(text: str) -> Fraction | None:
    """The number that all of `text` writes as words; None where it writes none, or anything else."""
    words = _AFTER_A_SCALE.sub(r"\1 ", text.lower().replace("-", " ")).split()
    if not 0 < len(words) <= _LONGEST:
        return None
    if words[0] in ("minus", "negative"):
        rest = _magnitude(words[1:])
        return None if rest is None else -rest
    return _magnitude(words)


def _magnitude(words: list[str]) -> Fraction | None:
    if words == ["a", "dozen"] or words == ["one", "dozen"]:
        return Fraction(12)
    if (part := _fraction(words)) is not None:
        return part
    for at, word in enumerate(words):  # one and a half
        if word == "and" and (whole := _whole(words[:at])) is not None and (part := _fraction(words[at + 1 :])):
            return whole + part if part < 1 else None
    whole = _whole(words)
    return None if whole is None else Fraction(whole)


def _fraction(words: list[str]) -> Fraction | None:
    """half, a third, two fifths."""
    if words == ["half"]:
        return Fraction(1, 2)
    if len(words) != 2 or words[1] not in _PARTS:
        return None
    count = 1 if words[0] == "a" else _SMALL.get(words[0], 0)
    return Fraction(count, _PARTS[words[1]]) if count else None


def _whole(words: list[str]) -> int | None:
    """A whole number: its thousands and more from the greatest down, then what is below."""
    total, at = 0, 0
    for scale, factor in _SCALES.items():
        part = _below_thousand(words, at)
        if part is not None and part[1] < len(words) and words[part[1]] == scale:
            total, at = total + part[0] * factor, part[1] + 1
            if at == len(words):
                return total
            at += words[at] == "and"
    last = _below_thousand(words, at)
    # `a` begins a hundred, and no smaller number.
    if last is None or last[1] < len(words) or (words[at] == "a" and last[0] < 100):
        return None
    return total + last[0]


def _below_thousand(words: list[str], at: int) -> Read | None:
    first = (1, at + 1) if at < len(words) and words[at] == "a" else _below_hundred(words, at)
    if first is None or first[1] >= len(words) or words[first[1]] != "hundred" or first[0] == 0:
        return first
    value, end = first[0] * 100, first[1] + 1
    more = _below_hundred(words, end + (end < len(words) and words[end] == "and"))
    return (value + more[0], more[1]) if more is not None and more[0] else (value, end)


def _below_hundred(words: list[str], at: int) -> Read | None:
    word = words[at] if at < len(words) else ""
    if word in _SMALL:
        return _SMALL[word], at + 1
    if word not in _TEN:
        return None
    one = _SMALL.get(words[at + 1], 0) if at + 1 < len(words) else 0
    return (_TEN[word] + one, at + 2) if 0 < one < 10 else (_TEN[word], at + 1)
