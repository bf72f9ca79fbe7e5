"""Find the answer in what a model wrote, and compare it with the gold one. Numbers are exact fractions, never floats.

`compare_latex` reads numbers, words, and tuples, sets, intervals and lists of what it can read; other expressions are
equal where they are written alike. What is left goes to math-verify where that is installed. All ask one reader of
numbers, one form of words and one splitter of lists.
"""

from __future__ import annotations

import re

from finemoe.text.answers.judge import Equality, available, shared_judge
from finemoe.text.answers.numbers import LONGEST, Number, numbers_in, read_number, spelled, written
from finemoe.text.answers.words import split_list, split_outside, word_form

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
    text = spelled(text)
    for part in _places(text):
        sentence = re.split(r"\n|\.(?:\s|$)|(?<!\d),\s|;", part.strip(), maxsplit=1)[0]
        if (number := _first_number(sentence.rsplit("=", 1)[-1]) or _first_number(sentence)) is not None:
            return number
    numbers = list(numbers_in(text))
    return written(numbers[-1].value) if numbers else None


def _places(text: str) -> list[str]:
    """Where a solution says its answer, the surest first."""
    places = [text.rsplit("####", 1)[1]] if "####" in text else []
    if (box := boxed(text)) is not None:
        places.append(box)
    said = list(_SAYS.finditer(text))
    return [*places, text[said[-1].end() :]] if said else places


def _first_number(text: str) -> str | None:
    first = next(numbers_in(text), None) or read_number(text)  # which knows numbers written as words
    return None if first is None else written(first.value)


def compare_numbers(gold: str, given: str) -> Equality:
    """Whether two texts are one number, in any of the spellings that `answers.numbers` reads.

    A per cent sign on one side alone is read both ways: 50% is 50 and 0.5. `unreadable`: one of them is no number.
    """
    numbers = [read_number(_tidy(text)) for text in (gold, given)]
    if numbers[0] is None or numbers[1] is None:
        return "unreadable"
    return _same_number(numbers[0], numbers[1])


def compare_words(gold: str, given: str) -> Equality:
    """Whether two short answers are the same: numbers by their value, options by their letter, words by `word_form`.

    Never `unreadable`: words that are not the same are different.
    """
    numbers = compare_numbers(gold, given)
    if numbers != "unreadable":
        return numbers
    first, second = (_LETTER.sub(r"\1", word_form(text)) for text in (gold, given))
    return "equal" if first == second else "different"


_LETTER = re.compile(r"^\(?([a-z])\)(?:\s.*)?$")


def _same_number(a: Number, b: Number) -> Equality:
    if a.value == b.value:
        return "equal"
    if a.percent != b.percent and (a.value / 100 if a.percent else a.value) == (
        b.value / 100 if b.percent else b.value
    ):
        return "equal"
    return "different"


_WORDS = re.compile(r"\\(?:text|textrm|textnormal|mathrm|textbf|textit|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT_IN_TEXT = re.compile(
    r"(?<=[\d})%])\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*(?:[ap]\.?m|and\b|or\b))[^{}]*\}(?:\s*\^\s*\{?[23]\}?)?\s*\.?$",
    re.IGNORECASE,
)
_REWRITES = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|,|!|;|:|quad|qquad)(?![a-zA-Z])\.?"), " "),
    (re.compile(r"°"), ""),
    (re.compile(r"(?:\bUS)?\$|[€£¥₹]|\\[()]"), ""),
    (re.compile(r"\\(?:leq?)(?![a-zA-Z])|≤"), r"\\le "),
    (re.compile(r"\\(?:geq?)(?![a-zA-Z])|≥"), r"\\ge "),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne "),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"∅|\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"±"), r"\\pm "),
    (re.compile(r"\\(?:lor|vee)(?![a-zA-Z])|∨"), " or "),
    (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"√\(?(\w+)\)?"), r"\\sqrt{\1}"),
    (re.compile(r"([_^])\{(\w)\}"), r"\1\2"),
    (re.compile(r"\\\s|~"), " "),
    (re.compile(r"\s+"), " "),
)
_OPTION = re.compile(r"^\(([A-Za-z])\)$")
_NAMED = re.compile(r"^([a-zA-Z](?:_\w)?)(?:\([a-z]\))? ?(?:=|\\in(?![a-zA-Z])) ?(?!.*[=<>])")


def _tidy(text: str) -> str:
    """One spelling of an expression: without dollar signs, units in LaTeX, sizes of brackets, and `x =`."""
    text = text.strip()[: 2 * LONGEST]
    if (inner := boxed(text)) is not None:
        text = inner
    text = spelled(text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _WORDS.sub(r" \1 ", _UNIT_IN_TEXT.sub("", text.strip()))
    text = " ".join(text.split()).rstrip(". ")
    return _OPTION.sub(r"\1", _NAMED.sub("", text))


def compare_latex(gold: str, given: str | None, deadline_seconds: float = 5.0) -> Equality:
    r"""Whether two answers in LaTeX are the same.

    `different` is said of numbers, of words, and of lists, tuples, sets and intervals whose parts differ so; with
    math-verify also of expressions. Lists are parted by commas, semicolons, `and` and `or`, and their order is none.
    `unreadable`: there is no answer, or, without math-verify, two expressions are written in different ways and
    nothing here can tell. `error`: math-verify failed, or needed more than `deadline_seconds` for this pair; that is
    never a wrong answer.
    """
    if given is None or not gold.strip() or not given.strip():
        return "unreadable"
    verdict = _compare(_tidy(gold), _tidy(given))
    if verdict != "unreadable" or not available():
        return verdict
    if max(len(gold), len(given)) > LONGEST:
        return "unreadable"
    return shared_judge().compare(gold, given, deadline_seconds)


def _tight(text: str) -> str:
    """Without blanks, but for those between two numbers."""
    return _BLANK.sub("", text)


_BLANK = re.compile(r"(?<!\d) | (?!\d)")


def _compare(a: str, b: str) -> Equality:
    """Compare two tidy forms."""
    if not a or not b:
        return "unreadable"
    if _tight(a) == _tight(b):
        return "equal"
    numbers = read_number(a), read_number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return _same_number(numbers[0], numbers[1])
    words = [_is_words(text) for text in (a, b)]
    if all(words) and word_form(a) == word_form(b):
        return "equal"
    first, second = _parts(a), _parts(b)
    if len(first[1]) > 1 or len(second[1]) > 1 or first[0] == second[0] != "":
        return _compare_parts(first, second)
    told = [word or number is not None for word, number in zip(words, numbers, strict=True)]
    return "different" if all(told) and sorted(_tight(a)) != sorted(_tight(b)) else "unreadable"  # xy and yx


def _is_words(text: str) -> bool:
    """Whether this is prose: a word, or several, not all of them letters of a formula."""
    return _PROSE.fullmatch(text) is not None and (" " not in text or _LONG.search(text) is not None)


_PROSE = re.compile(r"[\"']?[^\W\d_]+(?:(?:[.,;:!?'\"]* |['’-])[\"']?[^\W\d_]+)*[.,;:!?'\"]*")
_LONG = re.compile(r"[^\W\d_]{3}")


_ORDERED = {"()", "[]", "(]", "[)"}


def _compare_parts(first: tuple[str, list[str]], second: tuple[str, list[str]]) -> Equality:
    if first[0] != second[0]:
        loose = {first[0], second[0]} == {"", "{}"}  # 1, 2 and {1, 2} list the same values
        if not loose:
            plain = all(read_number(part) is not None for part in (*first[1], *second[1]))
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
    r"""The kind of brackets around a tidy text, "" without, and what commas, words (or \cup) part inside them."""
    union = split_outside(text, _CUP)
    if len(union) > 1:
        return "∪", union
    for opening, closing, kind in ((r"\{", r"\}", "{}"), *((k[0], k[1], k) for k in sorted(_ORDERED))):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            inner = text[len(opening) : -len(closing)]
            parts = _unnamed(split_list(inner))
            if len(parts) == 1:
                parts = split_outside(inner, _COMMA, numbers=False)  # (100,200)
            if len(split_list(text)) == 1 and (len(parts) > 1 or kind == "{}"):
                return kind, parts
    return "", _unnamed(split_list(text))


_CUP = re.compile(r"\\cup(?![a-zA-Z])")
_COMMA = re.compile(",")


def _unnamed(parts: list[str]) -> list[str]:
    r"""Parts without `x =`, where that is one name throughout, with both values of \pm."""
    names = {found[1][0] for part in parts if (found := _NAMED.match(part))}
    bare = [_NAMED.sub("", part) if len(names) == 1 else part for part in parts]
    both: list[str] = []
    for part in bare:
        value = part.removeprefix(r"\pm").strip()
        both += [value, f"-{value}"] if value != part else [part]
    return both
