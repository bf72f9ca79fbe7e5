"""Find the answer in what a model wrote, and compare it with the gold one. Numbers are exact fractions, never floats.

Words: `normalize_text`, `exact_match`, `token_f1`, `drop_f1`. Numbers: `final_number`, `compare_numbers`. LaTeX:
`boxed`, `compare_latex`. The last reads numbers, and tuples, sets, intervals and lists of what it can read; other
expressions are equal where they are written alike. What is left goes to math-verify where that is installed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from finemoe.text.answers_judge import Equality, available, shared_judge
from finemoe.text.answers_overlap import drop_exact_match, drop_f1, exact_match, normalize_text, token_f1

__all__ = [
    "Equality",
    "boxed",
    "compare_latex",
    "compare_numbers",
    "drop_exact_match",
    "drop_f1",
    "exact_match",
    "final_number",
    "normalize_text",
    "token_f1",
]

_LONGEST = 2000  # characters of a number or expression that is read at all
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIMPLE = re.compile(rf"({_DECIMAL})(?:e([+-]?\d{{1,3}}))?", re.IGNORECASE)
_POWER = re.compile(rf"(?:({_DECIMAL})(?:\\times|\\cdot|\*|×|·|x))?10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d))")
_RATIO = re.compile(rf"(?:(\d+)\+)?\(?([+-]?{_DECIMAL})\)?/\(?([+-]?{_DECIMAL})\)?")
_FRACTION = re.compile(rf"(?:(\d+)\+?)?\\frac(?:\{{([+-]?{_DECIMAL})\}}|(\d))(?:\{{([+-]?{_DECIMAL})\}}|(\d))")

_IN_TEXT = re.compile(
    r"(?<![\w.])(?P<sign>[-−+]?)\s?(?:\\?[$€£¥]\s?)?(?P<sign2>[-−]?)"
    r"(?:\\[dt]?frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}"
    r"|(?P<number>\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?P<rest>\.\d+)?(?:/(?P<below>\d+)(?![\d/]))?"
    r"|(?P<point>\.\d+))"
)
_BARE_SIGN = re.compile(r"(?<=[\d)\]}])\s*[-−+](?=\s?[\d$.\\])")
_SAYS = re.compile(r"\banswer\s*(?:is|are|was|:|=)", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}`, `\fbox{...}` or `\boxed 5` holds; None without one, or where it never closes."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not found:
        return None
    start = found[-1].end()
    if not text.startswith("{", start):
        bare = re.match(r"[^\s$]+", text[start:])
        return bare.group().rstrip(".,;") or None if bare else None
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start + 1 : at].strip()
        at += 1
    return None


def final_number(text: str) -> str | None:
    r"""The number that a worked solution ends on, in one form: `1234`, `-0.5`, `2/3`; None without a number.

    Looked for after the last `####`, in the last box, after the last "answer is", and at last anywhere: then the last
    number counts. Where an equation follows those words, its right-hand side does. Units and signs of per cent and
    currency are left out.
    """
    for part in _places(text):
        sentence = re.split(r"\n|\.(?:\s|$)|(?<!\d),\s|;", part.strip(), maxsplit=1)[0]
        if (number := _first_number(sentence.rsplit("=", 1)[-1]) or _first_number(sentence)) is not None:
            return number
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _places(text: str) -> list[str]:
    """Where a solution says its answer, the surest first."""
    places = [text.rsplit("####", 1)[1]] if "####" in text else []
    if (box := boxed(text)) is not None:
        places.append(box)
    said = list(_SAYS.finditer(text))
    return [*places, text[said[-1].end() :]] if said else places


def _first_number(text: str) -> str | None:
    return next(iter(_numbers(text)), None)


def _numbers(text: str) -> list[str]:
    """All numbers of a text, as `final_number` writes them. A minus between two terms is no sign."""
    text = _BARE_SIGN.sub(lambda match: " " * len(match.group()), text)
    found = []
    for match in _IN_TEXT.finditer(text):
        group = match.groupdict()
        if group["over"]:
            above, below = group["over"], group["under"]
        else:
            above = re.sub(r"[,{}]", "", group["number"] or "0") + (group["rest"] or group["point"] or "")
            below = group["below"] or "1"
        if len(match.group()) > _LONGEST or not int(below):
            continue
        negative = (group["sign"] in ("-", "−")) != bool(group["sign2"])
        found.append(_written((-1 if negative else 1) * Fraction(above) / int(below)))
    return found


def _written(value: Fraction) -> str:
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


def compare_numbers(gold: str, given: str) -> Equality:
    """Whether two texts are one number: integer, decimal, fraction, mixed, scientific, LaTeX or plain.

    A per cent sign on one side alone is read both ways: 50% is 50 and 0.5. `unreadable`: one of them is no number.
    """
    numbers = [_number(_plain(text)) for text in (gold, given)]
    if numbers[0] is None or numbers[1] is None:
        return "unreadable"
    return _same_number(numbers[0], numbers[1])


Number = tuple[Fraction, bool]  # the value as written, and whether a per cent sign follows


def _same_number(a: Number, b: Number) -> Equality:
    if a[0] == b[0]:
        return "equal"
    if a[1] != b[1] and (a[0] / 100 if a[1] else a[0]) == (b[0] / 100 if b[1] else b[0]):
        return "equal"
    return "different"


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _number(plain: str) -> Number | None:
    """The number that a text in `_plain` form is, if it is one."""
    if len(plain) > _LONGEST:
        return None
    percent = plain.endswith("%")
    text = plain.rstrip("%")
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    if match := _SIMPLE.fullmatch(text):
        return sign * _value(match[1]) * Fraction(10) ** int(match[2] or 0), percent
    if match := _POWER.fullmatch(text):
        return sign * _value(match[1] or "1") * Fraction(10) ** int(match[2] or match[3]), percent
    if match := _RATIO.fullmatch(text):
        whole, above, below = match[1], match[2], match[3]
    elif match := _FRACTION.fullmatch(text):
        whole, above, below = match[1], match[2] or match[3], match[4] or match[5]
    else:
        return None
    if _value(below) == 0:
        return None
    return sign * (int(whole or 0) + _value(above) / _value(below)), percent


_WORDS = re.compile(r"\\(?:text|mathrm|textbf|textit|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNITS = re.compile(
    r"(?<=[\d}])\s*(?:square|cubic|sq\.?|cu\.?)?\s*(?:units?|degrees?|dollars?|cents?|inch(?:es)?|in\.|feet|foot|ft\.?"
    r"|yards?|miles?|cm|mm|km|kg|grams?|meters?|metres?|centimeters?|hours?|hrs?|minutes?|mins?|seconds?|days?"
    r"|weeks?|months?|years?|mph|points?|percent|per\s*cent|people|students?|ways|times)"
    r"(?:\s*(?:\^\s*\{?[23]\}?|[²³]))?\s*\.?\s*$",
    re.IGNORECASE,
)
_UNIT_IN_TEXT = re.compile(
    r"(?<=[\d})%])\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*[ap]\.?m)[^{}]*\}(?:\s*\^\s*\{?[23]\}?)?\s*\.?$", re.IGNORECASE
)
_PERCENT = re.compile(r"\s*(?:\\%|percent|per\s+cent)", re.IGNORECASE)
_REWRITES = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|,|!|;|:|quad|qquad)(?![a-zA-Z])\.?"), " "),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°"), ""),
    (re.compile(r"\\\$|(?<!\\)\$|[€£¥]|\\[()]"), ""),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3})"), ","),
    (re.compile(r"\\(?:leq?)(?![a-zA-Z])|≤"), r"\\le "),
    (re.compile(r"\\(?:geq?)(?![a-zA-Z])|≥"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"√\(?(\w+)\)?"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"([_^])\{(\w)\}"), r"\1\2"),
    (re.compile(r"(?<=\d)\s+(?=\d+\s*/\s*\d)"), "+"),  # 3 1/2
    (re.compile(r"(?<=\d)\s+(?=\d{3}(?!\d))"), ""),  # 1 000
    (re.compile(r"\\\s|~"), " "),
)
_OPTION = re.compile(r"^\(([A-Z])\)$")
_NUMERALS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15",
    "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20",
}  # fmt: skip
_NAMED = re.compile(r"^[a-zA-Z](?:\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))(?!.*[=<>])")


def _plain(text: str) -> str:
    """One spelling of an expression: without blanks, dollar signs, units, sizes of brackets, and `x =`."""
    text = text.strip()[: 2 * _LONGEST]
    if (inner := boxed(text)) is not None:
        text = inner
    text = _UNIT_IN_TEXT.sub("", _PERCENT.sub("%", text))
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    if (bare := _WORDS.sub(r" \1", text).strip()) and re.search(r"\d", _WORDS.sub("", text)):
        text = _UNITS.sub("", bare)
    else:
        text = bare.lower() if bare.isalpha() and len(bare) > 1 else bare
    text = _NAMED.sub("", text.strip().rstrip(".").strip())
    text = _NUMERALS.get(text, text)
    return re.sub(r"\s+", "", _OPTION.sub(r"\1", text))


def compare_latex(gold: str, given: str | None, deadline_seconds: float = 5.0) -> Equality:
    r"""Whether two answers in LaTeX are the same.

    `different` is said of numbers, of words, and of lists, tuples, sets and intervals whose parts differ so; with
    math-verify also of expressions. `unreadable`: there is no answer, or, without math-verify, two expressions are
    written in different ways and nothing here can tell. `error`: math-verify failed, or needed more than
    `deadline_seconds` for this pair; that is never a wrong answer.
    """
    if given is None or not gold.strip() or not given.strip():
        return "unreadable"
    verdict = _compare(_plain(gold), _plain(given))
    if verdict != "unreadable" or not available():
        return verdict
    if max(len(gold), len(given)) > _LONGEST:
        return "unreadable"
    return shared_judge().compare(gold, given, deadline_seconds)


def _compare(a: str, b: str) -> Equality:
    """Compare two plain forms."""
    if not a or not b:
        return "unreadable"
    if a == b:
        return "equal"
    numbers = _number(a), _number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return _same_number(numbers[0], numbers[1])
    first, second = _parts(a), _parts(b)
    if len(first[1]) > 1 or len(second[1]) > 1 or first[0] == second[0] != "":
        return _compare_parts(first, second)
    words = [number is not None or text.isalpha() for number, text in zip(numbers, (a, b), strict=True)]
    return "different" if all(words) and sorted(a) != sorted(b) else "unreadable"  # xy and yx are one product


_ORDERED = {"()", "[]", "(]", "[)"}


def _compare_parts(first: tuple[str, list[str]], second: tuple[str, list[str]]) -> Equality:
    if first[0] != second[0]:
        loose = {first[0], second[0]} == {"", "{}"}  # 1, 2 and {1, 2} list the same values
        if not loose:
            plain = all(_number(part) is not None for part in (*first[1], *second[1]))
            return "different" if plain and first[0] and second[0] else "unreadable"
    if first[0] in _ORDERED:
        if len(first[1]) != len(second[1]):
            return "different"
        each = {_compare(a, b) for a, b in zip(first[1], second[1], strict=True)}
    else:
        each = {
            _any(_compare(a, b) for b in others)
            for own, others in ((first[1], second[1]), (second[1], first[1]))
            for a in own
        }
    return "different" if "different" in each else "unreadable" if "unreadable" in each else "equal"


def _any(found: object) -> Equality:
    """Whether one of several comparisons found the same."""
    each = set(found)  # type: ignore[call-overload]
    return "equal" if "equal" in each else "unreadable" if "unreadable" in each else "different"


def _parts(text: str) -> tuple[str, list[str]]:
    r"""The kind of brackets around a plain text, "" without, and what commas (or \cup) part inside them."""
    union = _split(text, r"\cup")
    if len(union) > 1:
        return "∪", union
    for opening, closing, kind in ((r"\{", r"\}", "{}"), *((k[0], k[1], k) for k in sorted(_ORDERED))):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)]
            parts = _split(inner, ",")
            if len(_split(text, ",")) == 1 and (len(parts) > 1 or kind == "{}"):
                return kind, parts
    return "", [part.removeprefix("and") for part in _split(text, ",")]


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark` outside all brackets; a comma within 1,234 is none."""
    if mark == "," and _SIMPLE.fullmatch(text.lstrip("+-")):
        return [text]
    depth, cuts, at = 0, [-len(mark)], 0
    while at < len(text):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(mark, at):
            cuts.append(at)
        at += 1
    return [text[a + len(mark) : b] for a, b in pairwise([*cuts, len(text)])]
