r"""The one reader of numbers: whoever compares or looks for quantities asks here. Values are exact fractions.

Read are integers, decimals, mixed numbers (`1 1/2`, `1\frac12`, `1½`), ratios, per cent, powers (`2^10`, `10^{-3}`,
`10⁵`), scientific ones (`1e3`, `1.5 × 10^3`), thousands parted by commas, blanks, underscores or apostrophes, any sign
that people use as a minus, currency before and units after.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from finemoe.text.answers.number_words import number_in_words
from finemoe.text.answers.words import QUOTES

LONGEST = 2000  # characters of a number or expression that is read at all
_LONGEST_PART = 500  # of what stands above or below a line in LaTeX
_MOST_DIGITS = 4000  # of what a power comes to
_MOST_UNIT_WORDS = 3


@dataclass(frozen=True)
class Number:
    """The value as written, and whether a per cent sign follows."""

    value: Fraction
    percent: bool = False


_POWERS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))
_RAISED = re.compile(rf"(?<=[\w)}}])[{''.join(_POWERS)}]+")
_VULGAR = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e\u2189])")  # 1½ is not 11/2
_SPELLINGS = (
    (re.compile(r"[\u200b-\u200d\u2060\ufeff]"), ""),
    (re.compile(r"[−–‐‑‒﹣－]"), "-"),
    (re.compile(r"[⁄∕]"), "/"),
    (re.compile(r"(?<=\d)(?:\\[,;:! ]|~)+(?=\d{3}(?!\d)|\\[dtc]?frac)"), " "),  # 10\,000
    (re.compile(r"(?<=\d)(?:\{,\}|,\\[!,]?)(?=\d{3}(?!\d))"), ","),  # 10{,}000 and 10,\!000
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])|[×·⋅]"), " * "),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"), "°"),
    (re.compile(r"(?<=[\w)}])(?<![a-zA-Z]{2})(\s?)\*\*\1(?=[-+({\w])"), "^"),
    (re.compile(r"\*\*|(?<!\w)__(?=\S)|(?<=[^\s_])__(?!\w)"), " "),  # bold letters of Markdown
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"(?<![\d.,])(\d+),(\d\d)(?= *(?:€|euros?\b|EUR\b))", re.IGNORECASE), r"\1.\2"),
    (re.compile(r"(?<=€)( ?\d+),(\d\d)(?![\d]|[.,]\d)"), r"\1.\2"),
)


def spelled(text: str) -> str:
    """`text` with one spelling for signs, blanks, powers, vulgar fractions and thousands; LaTeX stays LaTeX."""
    text = _RAISED.sub(lambda found: "^{" + "".join(_POWERS[each] for each in found[0]) + "}", text)
    text = unicodedata.normalize("NFKC", _VULGAR.sub(" ", text)).translate(QUOTES)
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    return text


_THOUSANDS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:_\d{3})+|\d{1,3}(?:'\d{3})+|\d{1,3}(?: \d{3})+)(?!\d)"
_GROUPED = re.compile(_THOUSANDS)
_DIGITS = re.compile(r"\d+")
_DECIMAL = re.compile(rf"(?:{_THOUSANDS}|\d+)(?:\.\d+)?|\.\d+")
_CONTINENTAL = re.compile(  # where hardly anything else is meant: 1.234.567, 1.234,56, 1 234,5
    r"(?:\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3}|[' ]\d{3})+,\d{1,2})(?![\d]|[.,]\d)"
)
_CURRENCY = r"(?:US)?[$€£¥₹] *|(?:USD|EUR|GBP) +"
_SIGN = re.compile(rf"(?:([-+])|(minus|negative)\b)? *(?:{_CURRENCY})?(-?)", re.IGNORECASE)
_EXPONENT = re.compile(r"e([+-]?\d{1,3})(?!\w)", re.IGNORECASE)
_RAISE = re.compile(r" *\^ *(?:\{ *([+-]?\d{1,3}) *\}|\( *([+-]?\d{1,3}) *\)|([+-]?\d{1,3})(?!\d))")
_RAISED_AGAIN = re.compile(r" *\^")
_TIMES = re.compile(r" *[*xX] *(?=\d)")
_OVER = re.compile(r" */ *(?=[\d.(+-])")
_CLOCK = re.compile(r":\d")
_PLUS_MINUS = re.compile(r" *([+-]?) *")
_CLOSE = re.compile(r" *\)")
_PROPER = re.compile(r"(?: +(?:and +)?|(?=\\frac))(?=[1-9]|0(?!\d)|\\frac)", re.IGNORECASE)
_SCALE = re.compile(r" *\b(thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PERCENT = re.compile(r" *(?:%|per *cent\b)", re.IGNORECASE)

Read = tuple[Fraction, int]  # a value and where it ends


def _decimal(text: str, at: int) -> Read | None:
    if continental := _CONTINENTAL.match(text, at):
        plain = re.sub(r"[.' ]", "", continental[0]).replace(",", ".")
        return (Fraction(plain), continental.end()) if len(plain) <= LONGEST else None
    found = _DECIMAL.match(text, at)
    if found is None or len(found[0]) > LONGEST:
        return None
    return Fraction(re.sub(r"[,_' ]", "", found[0])), found.end()


def _power(text: str, at: int) -> Read | None:
    """A decimal, raised to a whole power where there is one."""
    if (base := _decimal(text, at)) is None:
        return None
    if raised := _RAISE.match(text, base[1]):
        exponent = int(raised[1] or raised[2] or raised[3])
        digits = len(str(base[0].numerator)) + len(str(base[0].denominator))
        if digits * abs(exponent) > _MOST_DIGITS or (base[0] == 0 and exponent < 0):
            return None
        return base[0] ** exponent, raised.end()
    return base


def _factor(text: str, at: int) -> Read | None:
    """A decimal or power, in scientific form where it is: 1e3, 1.5 * 10^3."""
    if (first := _power(text, at)) is None:
        return None
    if exponent := _EXPONENT.match(text, first[1]):
        return first[0] * Fraction(10) ** int(exponent[1]), exponent.end()
    times = _TIMES.match(text, first[1])
    if times and (second := _power(text, times.end())) and "^" in text[times.end() : second[1]]:
        return first[0] * second[0], second[1]
    return first


def _group(text: str, at: int) -> tuple[str, int] | None:
    """What stands between the brace at `at` and the one that closes it, and where that ends."""
    depth = 0
    for end in range(at, min(len(text), at + _LONGEST_PART)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return (text[at + 1 : end], end + 1) if text[at] == "{" else None
    return None


def _fraction(text: str, at: int) -> Read | None:
    r"""\frac{a}{b} of two numbers, neither of which is one."""
    if not text.startswith("\\frac", at):
        return None
    parts = []
    for _ in range(2):
        at = text.find("{", at)
        if at < 0 or (group := _group(text, at)) is None or "\\frac" in group[0]:
            return None
        number = read_number(group[0])
        if number is None or number.percent:
            return None
        parts.append(number.value)
        at = group[1]
    return (parts[0] / parts[1], at) if parts[1] else None


def _signed(text: str, at: int) -> Read | None:
    """A number of one part, in brackets or not, as it stands below or above a line."""
    bracket = text.startswith("(", at)
    sign = _PLUS_MINUS.match(text, at + bracket)
    if sign is None or (part := _factor(text, sign.end())) is None:
        return None
    end = part[1]
    if bracket:
        close = _CLOSE.match(text, end)
        if close is None:
            return None
        end = close.end()
    return -part[0] if sign[1] == "-" else part[0], end


def _ratio(text: str, at: int) -> Read | None:
    """a/b, but no date such as 1/2/2020; None where there is no line."""
    if (above := _signed(text, at)) is None or (over := _OVER.match(text, above[1])) is None:
        return None
    below = _signed(text, over.end())
    if below is None or below[0] == 0 or _OVER.match(text, below[1]):
        return None
    return above[0] / below[0], below[1]


def _mixed(text: str, at: int) -> Read | None:
    r"""A whole number and a proper fraction: 1 1/2, 1\frac12, 1 and 1/2."""
    for whole in (_DIGITS.match(text, at), _GROUPED.match(text, at)):
        joined = _PROPER.match(text, whole.end()) if whole else None
        if whole is None or joined is None:
            continue
        part = _fraction(text, joined.end()) or _ratio(text, joined.end())
        if part is not None and 0 < part[0] < 1 and len(whole[0]) <= LONGEST:
            return int(re.sub(r"[,_' ]", "", whole[0])) + part[0], part[1]
    return None


def number_at(text: str, at: int) -> tuple[Number, int] | None:
    """The number that begins at `at` in a `spelled` text, and where it ends; None where none does."""
    sign = _SIGN.match(text, at)
    if sign is None:
        return None
    start = sign.end()
    magnitude = _mixed(text, start) or _fraction(text, start) or _ratio(text, start) or _factor(text, start)
    if magnitude is None or (sign[1] and sign[3]):
        return None
    value, end = magnitude
    # A date, a division by nothing, too high a power, a time of day.
    if _OVER.match(text, end) or _RAISED_AGAIN.match(text, end) or _CLOCK.match(text, end):
        return None
    if scale := _SCALE.match(text, end):
        value, end = value * _SCALES[scale[1].lower()], scale.end()
    if (sign[1] == "-" or bool(sign[2])) != bool(sign[3]):
        value = -value
    percent = _PERCENT.match(text, end)
    return Number(value, percent is not None), percent.end() if percent else end


_UNIT = re.compile(
    r"\s*(?:square|cubic|sq\.?|cu\.?)?\s*(?:units?|degrees?|deg|dollars?|cents?|inch(?:es)?|in\.|feet|foot|ft\.?"
    r"|yards?|miles?|cm|mm|km|kg|lbs?|grams?|meters?|metres?|centimeters?|hours?|hrs?|minutes?|mins?"
    r"|seconds?|days?|weeks?|months?|years?|mph|points?|people|students?|ways|times|[$€£¥₹°]|USD|EUR|GBP"
    r"|°\s*[CF])(?:\s*(?:\^\s*\{?[23]\}?|[²³]))?\s*\.?\s*",
    re.IGNORECASE,
)
_THINGS = re.compile(r"\s+([a-z]{3,}(?:\s+[a-z]{2,}){0,2})\s*\.?\s*", re.IGNORECASE)
_NO_THINGS = frozenset(
    (
        *("and", "or", "pi", "sin", "cos", "tan", "cot", "log", "exp", "sqrt", "mod", "base", "root", "squared"),
        *("cubed", "factorial", "dozen", "dozens", "hundred", "hundreds", "half", "halves", "third", "thirds"),
        *("quarter", "quarters", "fourths", "fifths", "tenths", "hundredths", "over", "more", "less", "plus", "minus"),
        *("divided", "remainder", "infinity", "choose", "not", "but", "per", "if", "when", "where"),
    )
)
"""Words after a number that make it another number, or that are no thing that is counted."""


def read_number(text: str) -> Number | None:
    """The number that a whole text is, with its unit; None where it is none, or more than one."""
    text = spelled(text).strip()
    if len(text) > LONGEST:
        return None
    text = text.rstrip(".").rstrip()
    if (words := _in_words(text)) is not None:
        return Number(words)
    if text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1].strip()  # (-5)
    if (found := number_at(text, 0)) is None:
        return None
    number, end = found
    if end == len(text) or _UNIT.fullmatch(text, end):
        return number
    things = _THINGS.fullmatch(text, end)
    return number if things and not _NO_THINGS & set(things[1].lower().split()) else None


def _in_words(text: str) -> Fraction | None:
    """A number in words, with its unit."""
    if (alone := number_in_words(text)) is not None:
        return alone
    blanks = [found.start() for found in re.finditer(" ", text)][-_MOST_UNIT_WORDS:]
    return next((value for at in blanks if _UNIT.fullmatch(text, at) and (value := number_in_words(text[:at]))), None)


_START = re.compile(
    r"(?<![\w.\\])(?=[-+$€£¥₹\d.\\]|\([-+]?\d+\) ?/ ?\(?\d|minus\b|negative\b|USD |EUR |GBP )|(?<=[$€£¥₹])(?=\d)",
    re.IGNORECASE,
)
_NO_NUMBER = re.compile(r"[-+\d,./:]+(?:\^\{?[-+\d]+\}?)*")
_BARE_SIGN = re.compile(  # but for what a line begins with: 1 - 2 = -1, and below it -1
    r"(?<=[\d)\]}])(?!\s*\n[-+][\d$.\\])\s*(?:[-+]|minus\b)(?=\s?[\d$.\\])", re.IGNORECASE
)


def numbers_in(text: str) -> Iterator[Number]:
    """All numbers of a text, in their order. A minus between two terms is no sign."""
    text = spelled(text)
    text = _BARE_SIGN.sub(" | ", text)
    at = 0
    while (start := _START.search(text, at)) is not None:
        found = number_at(text, start.start())
        if found is None:
            digits = _NO_NUMBER.match(text, start.start())  # of what is no number, no part is one
            at = max(digits.end() if digits else 0, start.start() + 1)
            continue
        yield found[0]
        at = max(found[1], start.start() + 1)


def written(value: Fraction) -> str:
    """A fraction as a decimal where it has an end, else as a/b."""
    rest = value.denominator
    twos = fives = 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return f"-{text}" if value < 0 else text
